"""Every worker's counters reach whoever reads the shared folder, and the folder goes with its maker."""

import multiprocessing
import os
import stat
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from vllm_tokenselect import metrics
from vllm_tokenselect.counters import Counter
from vllm_tokenselect.metrics import (
    DIRECTORY_VARIABLE,
    CounterFile,
    CounterPublisher,
    EngineLabels,
    TokenSelectCollector,
    make_shared_directory,
)

LABELS = EngineLabels(model_name="model", engine="0")
OTHER = EngineLabels(model_name="model", engine="1")


@pytest.fixture(autouse=True)
def often(monkeypatch):
    """Look at the counters a hundred times a second."""
    monkeypatch.setattr(metrics, "INTERVAL", 0.01)


@pytest.fixture
def publish(tmp_path):
    """Start a publisher; all of them are stopped at the end."""
    started = []

    def start(tensor, directory=tmp_path, labels=LABELS):
        publisher = CounterPublisher(tensor, CounterFile(directory, labels).write)
        publisher.start()
        started.append(publisher)
        return publisher

    yield start
    for publisher in started:
        publisher.stop()


def wait_for(what, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not (result := what()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)
    return result


def read(directory):
    """What `/metrics` shows of a folder: each engine's counters by name."""
    engines = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(DIRECTORY_VARIABLE, str(directory))
        for metric in TokenSelectCollector().collect():
            for sample in metric.samples:
                kind = sample.labels.pop("kind", sample.name)
                engines.setdefault(EngineLabels(**sample.labels), {})[kind] = sample.value
    return engines


NAMES = (
    "reselected",
    "reused",
    "shared",
    "dense",
    "vllm:tokenselect_tokens_attended_total",
    "vllm:tokenselect_tokens_in_context_total",
)


def values(directory, labels=LABELS):
    counted = read(directory).get(labels)
    return counted and [counted.pop(name) for name in NAMES]


def test_what_is_counted_is_published_under_its_names(publish, tmp_path):
    tensor = torch.zeros(len(Counter), dtype=torch.int64)
    publish(tensor)
    wait_for(lambda: values(tmp_path) == [0] * 6)
    tensor += torch.tensor([1, 2, 3, 4, 2**40, 2**41])
    wait_for(lambda: values(tmp_path) == [1, 2, 3, 4, 2**40, 2**41])
    assert read(tmp_path)[LABELS].keys() == set(NAMES)


def test_what_did_not_change_is_not_written_again(publish, tmp_path):
    publish(torch.ones(len(Counter), dtype=torch.int64))
    wait_for(lambda: values(tmp_path))
    [file] = tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    time.sleep(0.2)
    assert file.stat().st_mtime_ns == written


def test_a_write_that_fails_is_told_once_and_made_up_for(publish, tmp_path, caplog):
    directory = tmp_path / "folder"
    directory.write_text("for now a file is in its place")
    publish(torch.ones(len(Counter), dtype=torch.int64), directory)
    wait_for(lambda: caplog.messages)
    time.sleep(0.1)
    directory.unlink()
    directory.mkdir()
    wait_for(lambda: values(directory) == [1] * 6)
    [message] = caplog.messages
    assert "the counters in /metrics fall behind" in message


def test_a_folder_that_goes_first_is_no_news(publish, tmp_path, caplog):
    publisher = publish(torch.zeros(len(Counter), dtype=torch.int64), tmp_path / "gone")
    publisher.stop()
    assert caplog.messages == []


def count_and_end(directory, labels, amount):
    """What a worker does: it counts a last time right before it ends, and stops nothing."""
    metrics.INTERVAL = 60.0
    tensor = torch.zeros(len(Counter), dtype=torch.int64)
    before = len(list(directory.iterdir()))
    CounterPublisher(tensor, CounterFile(directory, labels).write).start()
    wait_for(lambda: len(list(directory.iterdir())) > before)
    tensor += amount


def test_workers_of_several_processes_are_summed_by_engine_up_to_their_ends(tmp_path):
    fork = multiprocessing.get_context("fork")
    for labels, amount in ((LABELS, 1), (LABELS, 10), (OTHER, 100)):
        worker = fork.Process(target=count_and_end, args=(tmp_path, labels, amount))
        worker.start()
        worker.join()
        assert worker.exitcode == 0
    assert values(tmp_path, LABELS) == [11] * 6
    assert values(tmp_path, OTHER) == [100] * 6


def in_format(*entries):
    """A file as prometheus_client writes it."""
    content = b""
    for text, value in entries:
        padded = text + b" " * (8 - (len(text) + 4) % 8)
        content += struct.pack(f"i{len(padded)}sdd", len(text), padded, value, 0.0)
    return struct.pack("ixxxx", 8 + len(content)) + content


def test_files_of_others_and_unreadable_ones_are_left_out(publish, tmp_path):
    publish(torch.ones(len(Counter), dtype=torch.int64))
    wait_for(lambda: values(tmp_path))
    [good] = tmp_path.iterdir()
    content = good.read_bytes()
    unusable = {
        "empty": b"",
        "half-written": content[: len(content) // 2],
        "not text": in_format((b"\xff\xfe\x00", 1.0)),
        "not the format": b"{" + b"x" * 100,
        "a number": in_format((b"1", 1.0)),
        "too short a list": in_format((b"[1, 2]", 1.0)),
        "labels in a list": in_format((b'["n", "n_total", ["model", "0"], "help"]', 1.0)),
    }
    for name, data in unusable.items():
        (tmp_path / f"counter_tokenselect-{name}.db").write_bytes(data)
    (tmp_path / "counter_tokenselect-folder.db").mkdir()
    (tmp_path / "counter_7.db").write_bytes(content)
    (tmp_path / "counter_tokenselect-unfinished.tmp").write_bytes(content)
    assert values(tmp_path) == [1] * 6
    assert read(tmp_path).keys() == {LABELS}


def test_before_any_worker_and_after_the_folder_is_gone_there_are_no_counters(tmp_path):
    assert read(tmp_path) == {}
    assert read(tmp_path / "gone") == {}


def test_every_moment_of_a_file_is_one_that_was_counted(tmp_path):
    """A reader never finds half of a write, as it could in a file that is mapped."""
    file = CounterFile(tmp_path, LABELS)
    file.write([0] * len(Counter))
    [path] = tmp_path.iterdir()
    opened = path.open("rb")
    before = path.read_bytes()
    file.write([1] * len(Counter))
    assert opened.read() == before
    assert values(tmp_path) == [1] * 6
    assert list(tmp_path.iterdir()) == [path]


LAUNCHER = """
import multiprocessing, os, sys
from vllm_tokenselect.metrics import make_shared_directory

def child(directory):
    assert make_shared_directory() == directory

if __name__ == "__main__":
    directory = make_shared_directory()
    for method in ("fork", "spawn"):
        process = multiprocessing.get_context(method).Process(target=child, args=(directory,))
        process.start()
        process.join()
        assert process.exitcode == 0
        assert directory.is_dir(), f"its {method}ed child removed it"
    if os.fork() == 0:
        sys.exit()
    os.wait()
    assert directory.is_dir(), "its forked child removed it"
    print(directory)
"""


def launch(tmp_path, **environment):
    script = tmp_path / "launcher.py"
    script.write_text(LAUNCHER)
    unset = {key: text for key, text in os.environ.items() if key != DIRECTORY_VARIABLE}
    result = subprocess.run(
        [sys.executable, script],
        env=unset | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_a_temporary_folder_is_inherited_and_removed_by_its_maker_alone(tmp_path):
    made = launch(tmp_path, TMPDIR=str(tmp_path))
    assert made.startswith(str(tmp_path))
    assert not Path(made).exists()


def test_a_folder_that_the_user_named_is_made_and_stays(tmp_path):
    named = tmp_path / "of" / "the user"
    assert launch(tmp_path, TOKENSELECT_METRICS_DIR=str(named)) == str(named)
    assert named.is_dir()


def test_the_temporary_folder_is_private(monkeypatch, tmp_path):
    monkeypatch.setenv(DIRECTORY_VARIABLE, "")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert stat.S_IMODE(make_shared_directory().stat().st_mode) == 0o700

"""Every worker's counters reach whoever reads the shared folder, and the folder goes with its maker."""

import json
import multiprocessing
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from vllm_tokenselect import counters
from vllm_tokenselect.counters import (
    COUNTERS,
    CounterFile,
    CounterPublisher,
    EngineLabels,
    make_shared_directory,
    read_counters,
    worker_counters,
)

LABELS = EngineLabels(model_name="model", engine="0")
OTHER = EngineLabels(model_name="model", engine="1")


@pytest.fixture(autouse=True)
def often(monkeypatch):
    """Look at the counters a hundred times a second."""
    monkeypatch.setattr(counters, "INTERVAL", 0.01)


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


def values(directory, labels=LABELS):
    return list(read_counters(directory).get(labels, {}).values())


def test_a_process_has_one_tensor_a_device():
    cpu = worker_counters(torch.device("cpu"))
    assert cpu.shape == (len(COUNTERS),)
    assert cpu.dtype == torch.int64
    assert worker_counters(torch.device("cpu")) is cpu
    assert worker_counters(torch.device("meta")) is not cpu


def test_counters_made_in_inference_mode_can_be_added_to_outside_of_it():
    with torch.inference_mode():
        made = counters._counters_on.__wrapped__(torch.device("cpu"))
    made += 1


def test_what_is_counted_is_published_under_its_names(publish, tmp_path):
    tensor = torch.zeros(len(COUNTERS), dtype=torch.int64)
    publish(tensor)
    wait_for(lambda: values(tmp_path) == [0, 0, 0, 0, 0])
    tensor += torch.tensor([1, 2, 3, 2**40, 2**41])
    wait_for(lambda: values(tmp_path) == [1, 2, 3, 2**40, 2**41])
    assert read_counters(tmp_path)[LABELS]["reused"] == 2
    assert read_counters(tmp_path)[LABELS]["context"] == 2**41


def test_what_did_not_change_is_not_written_again(publish, tmp_path):
    publish(torch.ones(len(COUNTERS), dtype=torch.int64))
    wait_for(lambda: values(tmp_path))
    [file] = tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    time.sleep(0.2)
    assert file.stat().st_mtime_ns == written


def test_a_write_that_fails_is_told_once_and_made_up_for(publish, tmp_path, caplog):
    directory = tmp_path / "folder"
    directory.write_text("for now a file is in its place")
    publish(torch.ones(len(COUNTERS), dtype=torch.int64), directory)
    wait_for(lambda: caplog.messages)
    time.sleep(0.1)
    directory.unlink()
    directory.mkdir()
    wait_for(lambda: values(directory) == [1, 1, 1, 1, 1])
    [message] = caplog.messages
    assert "the counters in /metrics fall behind" in message


def test_a_folder_that_goes_first_is_no_news(publish, tmp_path, caplog):
    publisher = publish(torch.zeros(len(COUNTERS), dtype=torch.int64), tmp_path / "gone")
    publisher.stop()
    assert caplog.messages == []


def count_and_end(directory, labels, amount):
    """What a worker does: it counts a last time right before it ends, and stops nothing."""
    counters.INTERVAL = 60.0
    tensor = torch.zeros(len(COUNTERS), dtype=torch.int64)
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
    assert values(tmp_path, LABELS) == [11, 11, 11, 11, 11]
    assert values(tmp_path, OTHER) == [100, 100, 100, 100, 100]


def test_files_of_others_and_unreadable_ones_are_left_out(publish, tmp_path):
    publish(torch.ones(len(COUNTERS), dtype=torch.int64))
    wait_for(lambda: values(tmp_path))
    [good] = tmp_path.iterdir()
    content = json.loads(good.read_text())
    unusable = {
        "half-written": good.read_text()[:40],
        "not text": b"\xff\xfe\x00",
        "a list": [1, 2],
        "without counters": {"labels": content["labels"]},
        "a counter missing": {**content, "counters": {"reused": 1}},
        "no number": {**content, "counters": dict.fromkeys(COUNTERS, "many")},
        "other labels": {**content, "labels": {"instance": "x"}},
        "labels in a list": {**content, "labels": ["model", "0"]},
    }
    for name, what in unusable.items():
        data = what if isinstance(what, str | bytes) else json.dumps(what)
        (tmp_path / f"tokenselect-{name}.json").write_bytes(
            data if isinstance(data, bytes) else data.encode()
        )
    (tmp_path / "tokenselect-folder.json").mkdir()
    (tmp_path / "foreign.json").write_text(good.read_text())
    assert read_counters(tmp_path) == {LABELS: dict.fromkeys(COUNTERS, 1)}


def test_before_any_worker_and_after_the_folder_is_gone_there_are_no_counters(tmp_path):
    assert read_counters(tmp_path) == {}
    assert read_counters(tmp_path / "gone") == {}


LAUNCHER = """
import multiprocessing, os, sys
from vllm_tokenselect.counters import make_shared_directory

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
    unset = {key: text for key, text in os.environ.items() if key != counters.DIRECTORY_VARIABLE}
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
    monkeypatch.setenv(counters.DIRECTORY_VARIABLE, "")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert stat.S_IMODE(make_shared_directory().stat().st_mode) == 0o700

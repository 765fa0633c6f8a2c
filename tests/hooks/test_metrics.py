"""What workers counted is in /metrics, from one API server and from several, and only if selected."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

pytest.importorskip("vllm")

import torch
from prometheus_client import REGISTRY, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from vllm_tokenselect.config import SettingsError
from vllm_tokenselect.counters import Counter, worker_counters
from vllm_tokenselect.hooks import metrics
from vllm_tokenselect.hooks.engine_config import configure
from vllm_tokenselect.hooks.registration import backend_member
from vllm_tokenselect.metrics import DIRECTORY_VARIABLE, CounterPublisher

CPU = torch.device("cpu")

# vLLM's own route in an application without a server; between two scrapes workers count.
API_SERVER = """
import multiprocessing, sys
import torch
from types import SimpleNamespace
from vllm_tokenselect.counters import Counter, worker_counters
from vllm_tokenselect.hooks.metrics import serve_counters, start_publishing

CPU = torch.device("cpu")

def work(rank):
    config = SimpleNamespace(
        attention_config=SimpleNamespace(backend="TOKENSELECT"),
        model_config=SimpleNamespace(served_model_name="model"),
        parallel_config=SimpleNamespace(data_parallel_index=rank, rank=0, tensor_parallel_size=1),
    )
    start_publishing(config, CPU)
    worker_counters(CPU).add_(torch.tensor([7, 5, 2, 3, 100, 400]))

def scrape():
    answer = client.get("/metrics")
    assert answer.status_code == 200, answer
    print(answer.text, end="\\f")

if __name__ == "__main__":
    from fastapi import FastAPI
    from starlette.testclient import TestClient
    from vllm.entrypoints.serve.instrumentator.metrics import attach_router
    from vllm.v1.metrics.prometheus import unregister_vllm_metrics

    if sys.argv[1] == "selected":
        serve_counters()
        serve_counters()
    app = FastAPI()
    attach_router(app)
    client = TestClient(app)
    scrape()
    if sys.argv[1] != "selected":
        sys.exit()
    for method, rank in (("fork", 0), ("spawn", 0), ("fork", 1)):
        worker = multiprocessing.get_context(method).Process(target=work, args=(rank,))
        worker.start()
        worker.join()
        assert worker.exitcode == 0
    scrape()
    unregister_vllm_metrics()
    scrape()
"""


@pytest.fixture
def scrapes(tmp_path):
    """/metrics of an API server: before a worker counted, then, and without vLLM's own metrics."""

    def run(*, several: bool, selected: bool = True) -> list[str]:
        environment = {key: text for key, text in os.environ.items() if key != DIRECTORY_VARIABLE}
        if several:
            # As vLLM does in the launcher of several API servers.
            (tmp_path / "prometheus").mkdir()
            environment["PROMETHEUS_MULTIPROC_DIR"] = str(tmp_path / "prometheus")
        script = tmp_path / "api_server.py"
        script.write_text(API_SERVER)
        result = subprocess.run(
            [sys.executable, script, "selected" if selected else "not selected"],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.split("\f")[:-1]

    return run


def samples(page: str) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if "tokenselect" in sample.name
    }


def expected(engine: str, workers: int) -> dict[tuple[str, ...], float]:
    return {
        ("vllm:tokenselect_rows_total", engine, "reselected", "model", "0"): 7 * workers,
        ("vllm:tokenselect_rows_total", engine, "reused", "model", "0"): 5 * workers,
        ("vllm:tokenselect_rows_total", engine, "shared", "model", "0"): 2 * workers,
        ("vllm:tokenselect_rows_total", engine, "dense", "model", "0"): 3 * workers,
        ("vllm:tokenselect_tokens_attended_total", engine, "model", "0"): 100 * workers,
        ("vllm:tokenselect_tokens_in_context_total", engine, "model", "0"): 400 * workers,
    }


@pytest.mark.parametrize("several", [False, True], ids=["one API server", "several"])
def test_workers_of_each_engine_are_summed_in_the_metrics_of_any_api_server(scrapes, several):
    before, counted, unregistered = scrapes(several=several)
    assert samples(before) == {}
    assert samples(counted) == expected("0", workers=2) | expected("1", workers=1)
    assert samples(unregistered) == samples(counted)
    for name in ("rows", "tokens_attended", "tokens_in_context"):
        assert f"# TYPE vllm:tokenselect_{name}_total counter" in counted


def test_not_selected_nothing_appears(scrapes):
    [page] = scrapes(several=False, selected=False)
    assert "process_cpu_seconds_total" in page
    assert "tokenselect" not in page


def selected(config):
    config.attention_config.backend = backend_member()
    return config


@pytest.fixture
def own_state(monkeypatch):
    """As in a process that has not published anything and has no folder."""
    monkeypatch.setattr(metrics, "_asked_to_publish", False)
    monkeypatch.setenv(DIRECTORY_VARIABLE, "")
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)


def test_the_engine_is_configured_to_count_only_where_it_is_selected(make_vllm_config, own_state):
    config = make_vllm_config()
    configure(config, "cpu")
    assert not os.environ[DIRECTORY_VARIABLE]
    config.attention_config.backend = backend_member()
    configure(config, "cpu")
    made = os.environ[DIRECTORY_VARIABLE]
    assert made
    assert Path(made).is_dir()


@pytest.mark.parametrize("users", ["", "MINE, OURS"])
def test_rays_workers_get_the_variables_beside_those_that_the_user_names(
    users, own_state, monkeypatch
):
    from vllm.ray.ray_env import get_env_vars_to_copy

    monkeypatch.setenv("VLLM_RAY_EXTRA_ENV_VARS_TO_COPY", users)
    metrics.serve_counters()
    metrics.serve_counters()
    named = os.environ["VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"].split(",")
    ours = [DIRECTORY_VARIABLE, "PROMETHEUS_MULTIPROC_DIR"]
    assert named == (["MINE", "OURS"] if users else []) + ours
    assert get_env_vars_to_copy() >= set(named)


def test_a_folder_that_cannot_be_made_is_refused_by_name(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path / "file" / "folder"))
    with pytest.raises(SettingsError, match=f"{DIRECTORY_VARIABLE} names a folder that cannot"):
        metrics.serve_counters()


@pytest.fixture
def started(monkeypatch):
    """The publishers that were started; they are stopped at the end."""
    publishers = []
    start = CounterPublisher.start

    def record_and_start(publisher):
        publishers.append(publisher)
        start(publisher)

    monkeypatch.setattr(CounterPublisher, "start", record_and_start)
    yield publishers
    for publisher in publishers:
        publisher.stop()


def test_a_worker_publishes_once_under_the_labels_of_vllms_own_metrics(
    make_vllm_config, monkeypatch, tmp_path, own_state, started
):
    from vllm.v1.metrics.loggers import PrometheusStatLogger
    from vllm.v1.metrics.prometheus import unregister_vllm_metrics

    config = selected(make_vllm_config())
    config.parallel_config.data_parallel_index = 3
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path))
    metrics.serve_counters()
    metrics.start_publishing(make_vllm_config(), CPU)
    assert started == [], "another engine of this process, without TOKENSELECT"
    for _ in range(3):
        metrics.start_publishing(config, CPU)
    [publisher] = started
    publisher.stop()
    PrometheusStatLogger(config, [3])
    try:
        page = generate_latest(REGISTRY).decode()
    finally:
        unregister_vllm_metrics()
    labels = {
        family.name: [sample.labels for sample in family.samples]
        for family in text_string_to_metric_families(page)
    }
    [vllms_own] = labels["vllm:num_requests_running"]
    assert labels["vllm:tokenselect_tokens_attended"] == [{**vllms_own, "tp_rank": "0"}]


def test_a_worker_counts_from_when_it_is_warm(monkeypatch, tmp_path, own_state, started):
    counters = worker_counters(CPU)

    class Worker:
        vllm_config = SimpleNamespace(
            attention_config=SimpleNamespace(backend="TOKENSELECT"),
            model_config=SimpleNamespace(served_model_name="model"),
            parallel_config=SimpleNamespace(data_parallel_index=0, rank=0, tensor_parallel_size=1),
        )
        device = CPU

        def compile_or_warm_up_model(self):
            counters.fill_(1000)
            assert started == [], "nothing else may run while graphs are captured"
            return "times"

    monkeypatch.setattr("vllm.v1.worker.cpu_worker.CPUWorker", Worker)
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path))
    metrics.install("cpu")
    once = Worker.compile_or_warm_up_model
    metrics.install("cpu")
    assert Worker.compile_or_warm_up_model is once
    assert Worker().compile_or_warm_up_model() == "times"
    assert len(started) == 1
    assert counters.tolist() == [0] * len(Counter)


@pytest.mark.parametrize("runs_layers", [True, False])
def test_a_patched_worker_publishes_where_layers_run_on_tokenselect(
    runs_layers, load_patched, monkeypatch
):
    published = []
    monkeypatch.setattr(metrics, "start_publishing", lambda *args: published.append(args))
    monkeypatch.delitem(sys.modules, "vllm_tokenselect.backend", raising=False)
    if runs_layers:
        monkeypatch.setitem(sys.modules, "vllm_tokenselect.backend", SimpleNamespace())
    worker = MagicMock()
    worker.model_runner.kv_caches = [None]
    worker.model_config.seed = worker.parallel_config.data_parallel_index = 0
    patched = load_patched("vllm/v1/worker/cpu_worker.py")
    times = patched.CPUWorker.compile_or_warm_up_model(worker)
    assert times.language_model is worker.compilation_config.compilation_time
    assert published == ([(worker.vllm_config, worker.device)] if runs_layers else [])


@pytest.mark.parametrize("variable", [DIRECTORY_VARIABLE, "PROMETHEUS_MULTIPROC_DIR"])
@pytest.mark.parametrize("named", ["", "/not/on/this/machine"])
def test_a_worker_that_cannot_reach_the_folder_says_so_once_and_goes_on(
    variable, named, make_vllm_config, monkeypatch, own_state, started
):
    warnings = []
    logger = SimpleNamespace(warning=lambda text, *values: warnings.append(text % values))
    monkeypatch.setattr(metrics, "get_logger", lambda name: logger)
    monkeypatch.setenv(variable, named)
    for _ in range(3):
        metrics.start_publishing(selected(make_vllm_config()), CPU)
    assert started == []
    [warning] = warnings
    assert f"{variable} is {named or 'not set'} here" in warning

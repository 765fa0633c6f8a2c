"""`tokenselect bench` measures, draws and writes down, and refuses what it cannot ask before it asks."""

import functools
import json

import pytest
from typer.testing import CliRunner

from tests.tools.bench.server import MAX_MODEL_LEN, StreamingServer
from tests.tools.common.server import MODEL
from vllm_tokenselect.tools.bench import command, contenders, run
from vllm_tokenselect.tools.bench.command import _model_name
from vllm_tokenselect.tools.cli.app import app
from vllm_tokenselect.tools.common.server import ServerFailed

FEW = ("--lengths", "100,200", "--rounds", "2", "--generations", "2", "--output-tokens", "4")
FEW += ("--requests", "3", "--rates", "100")


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch):
    """Nothing here has threads that spin, or counters that come late."""
    quick = functools.partial(run.BenchSettings, pause=0.0, settle=0.0)
    monkeypatch.setattr(command, "BenchSettings", quick)


@pytest.fixture
def servers():
    with StreamingServer(first=0.02) as a, StreamingServer() as b:
        b.layers = 2
        yield a, b


def bench(*arguments: str):
    return CliRunner().invoke(app, ["bench", *arguments])


def test_two_running_servers_are_measured_drawn_and_written_down(servers, tmp_path):
    a, b = servers
    file, plots = tmp_path / "reports" / "bench.json", tmp_path / "plots"
    result = bench(
        *("--a", a.url, "--b", f"{b.url}/v1", *FEW, "--json", str(file), "--plots", str(plots))
    )
    assert result.exit_code == 0, result.output
    assert "One request at a time" in result.output
    assert "At rates, prompts of 100 tokens" in result.output
    report = json.loads(file.read_text())
    assert {"date", "command", "machine", "versions", "model", "asked"} <= report.keys()
    assert report["model"] == MODEL
    assert report["machine"]["runs"] == "the client only"
    assert report["servers"]["B"] == {"url": b.url, "model": MODEL, "version": "0.32.0"}
    assert report["asked"]["lengths"] == [100, 200]
    assert len(report["samples"]) == 2 * 2 * (2 * 2 + 3)
    assert report["samples"][0]["answer"]["ttft_s"] >= 0.02
    assert [one["reused"] for one in report["selected"]] == [0.75] * 3
    rows = report["summary"]
    assert [(row["prompt_tokens"], row["rate"], row["contender"]) for row in rows] == [
        *((n, None, name) for n in (100, 200) for name in "AB"),
        *((100, 100.0, name) for name in "AB"),
    ]
    assert rows[1]["faster"]["ttft_s"]["ratio"] > 1
    assert (rows[1]["attended"], rows[1]["worker_rss_mib"]) == (0.5, None)
    assert sorted(path.name for path in plots.iterdir()) == [
        "bench-throughput.png",
        "bench-tpot.png",
        "bench-ttft.png",
    ]


def test_prompts_of_running_servers_are_new_in_every_run(servers):
    a, b = servers
    command = ("--a", a.url, "--b", b.url, *FEW, "--requests", "0")
    assert bench(*command).exit_code == bench(*command).exit_code == 0
    prompts = [tuple(body["prompt"]) for body in a.bodies]
    half = len(prompts) // 2
    assert not set(prompts[:half]) & set(prompts[half:])


def test_requests_that_failed_are_told_and_the_rest_is_written_down(servers, tmp_path):
    a, b = servers
    file = tmp_path / "bench.json"
    b.failures = [200, 400, 400]  # the first request warms up
    result = bench("--a", a.url, "--b", b.url, *FEW, "--json", str(file))
    assert result.exit_code == 1
    told = result.output.replace("\n", " ")
    assert f"2 requests of B failed: {b.url}/v1/completions answered HTTP 400" in told
    rows = json.loads(file.read_text())["summary"]
    assert [row["failed"] for row in rows] == [0, 2, 0, 0, 0, 0]


def test_a_server_that_answers_nothing_is_an_error(servers, tmp_path):
    a, b = servers
    b.failures = [404]
    file = tmp_path / "bench.json"
    result = bench("--a", a.url, "--b", b.url, *FEW, "--json", str(file))
    assert result.exit_code == 1
    assert "answered HTTP 404" in result.output
    assert not file.exists()


REFUSED = {
    "one server": (("--a", "URL_A"), "--a and --b go together"),
    "the same server": (("--a", "URL_A", "--b", "URL_A/"), "--a and --b are both URL_A"),
    "settings of servers that run": (
        ("--a", "URL_A", "--b", "URL_B", "--settings", '{"top_k": 1}', "--", "--dtype", "half"),
        "--settings, arguments behind --: only for servers that are started here",
    ),
    "a length that is none": (("--lengths", "4K"), "--lengths '4K': tokens, separated by commas"),
    "a length that holds no prompt": (("--lengths", "20"), "--lengths 20: a prompt has 64 tokens"),
    "a length that the model cannot take": (
        ("--a", "URL_A", "--b", "URL_B", "--lengths", "100,4096"),
        f"--lengths 4096 and 4 of an answer: {MODEL} at URL_A takes {MAX_MODEL_LEN} tokens at most",
    ),
    "a text that is too short": (
        ("--a", "URL_A", "--b", "URL_B", "--text", "TEXT"),
        "the text has only",
    ),
    "a file that is not there": (("--text", "/no/file"), "/no/file"),
    "a length at rates that is not measured": (
        ("--rate-length", "300"),
        "--rate-length 300: it must be one of --lengths 100,200",
    ),
    "rates that are none": (("--rates", "1,fast"), "--rates '1,fast': requests a second"),
    "a rate of nothing": (("--rates", "0"), "--rates '0': requests a second"),
    "settings that are no object": (("--settings", "off"), "--settings 'off' is no JSON object"),
    "settings that there are not": (
        ("--settings", '{"topk": 5}'),
        "topk: there is no such setting",
    ),
    "more settings that there are not": (("--also", '{"top_k": 0}'), "top_k = 0"),
    "the same settings twice": (
        ("--also", '{"top_k": 9}', "--also", '{"top_k": 9}'),
        "one of them is there twice",
    ),
    "itself as the baseline": (("--baseline", "TOKENSELECT"), "compare settings of TOKENSELECT"),
    "a model in the wrong place": (("org/model",), "the model is named by --model"),
    "a server that does not answer": (
        ("--a", "http://127.0.0.1:9", "--b", "URL_B"),
        "http://127.0.0.1:9/v1/models does not answer",
    ),
}


@pytest.mark.parametrize(("arguments", "named"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_asked_is_refused_before_anything_is(
    servers, tmp_path, monkeypatch, arguments, named
):
    monkeypatch.setattr(contenders, "VllmServer", None)  # nothing is to be started
    a, b = servers
    text = tmp_path / "text"
    text.write_text("a few words")

    def filled(words: str) -> str:
        for name, value in (("URL_A", a.url), ("URL_B", b.url), ("TEXT", str(text))):
            words = words.replace(name, value)
        return words

    result = bench(*FEW, *map(filled, arguments))
    assert result.exit_code == 2, result.output
    assert filled(named) in result.output.replace("\n", " ")
    assert a.bodies == b.bodies == []


@pytest.mark.parametrize(
    ("served", "name"),
    [("org/model", "org/model"), ("/data/org/model", "model"), ("small", "small")],
)
def test_a_report_names_the_model_without_the_folders_of_a_machine(served, name):
    assert _model_name(served) == name


class SmallVllm:
    """In the place of VllmServer: a small server, and what it was started with."""

    def __init__(
        self, model, *, backend, settings, enforce_eager, extra_args, env, log_path
    ) -> None:
        self.model, self.backend, self.settings = model, backend, settings
        self.extra_args, self.env, self.log_path = extra_args, env, log_path
        self.enforce_eager = enforce_eager
        self.pid = None
        self.stopped = False

    def start(self, timeout, on_progress) -> None:
        self.timeout = timeout
        on_progress("loading weights", 0.5)
        if "--refuse" in self.extra_args and self.settings is not None:
            raise ServerFailed("vllm serve ended with status 1")
        self.small = StreamingServer()
        self.small.max_model_len = int(self.extra_args[1])
        if "--fail" in self.extra_args:
            self.small.failures = [200, 500]
        self.base_url = self.small.__enter__().url
        self.log_path.write_text("a log")

    def stop(self) -> None:
        self.stopped = True
        self.small.__exit__()


@pytest.fixture
def started(monkeypatch, tmp_path):
    """The servers that were started."""
    servers: list[SmallVllm] = []

    def start(model, **options) -> SmallVllm:
        servers.append(SmallVllm(model, **options, log_path=tmp_path / f"{len(servers)}.log"))
        return servers[-1]

    monkeypatch.setattr(contenders, "VllmServer", start)
    monkeypatch.setattr(contenders, "has_gpu", lambda: False)
    return servers


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(
        '{"model_type": "llama", "max_position_embeddings": 4099, "hidden_size": 64}'
    )
    return folder


def test_servers_are_started_with_what_was_asked_for_and_stopped(started, model, tmp_path):
    file = tmp_path / "bench.json"
    result = bench(
        *FEW,
        *("--model", str(model), "--baseline", "CPU_ATTN", "--settings", '{"top_k": 99}'),
        *("--also", '{"n_init": 7}', "--start-timeout", "7", "--json", str(file)),
        *("--", "--dtype", "half"),
    )
    assert result.exit_code == 0, result.output
    assert [(server.backend, server.settings) for server in started] == [
        ("CPU_ATTN", None),
        ("TOKENSELECT", {"top_k": 99}),
        ("TOKENSELECT", {"top_k": 99, "n_init": 7}),
    ]
    for server in started:
        assert server.extra_args == ["--max-model-len", "204", "--dtype", "half"]
        assert (server.model, server.enforce_eager, server.env) == (str(model), False, {})
        assert server.timeout == 7
        assert server.stopped
        assert not server.log_path.exists()
    report = json.loads(file.read_text())
    assert list(report["servers"]) == ["CPU_ATTN", "TOKENSELECT", 'TOKENSELECT {"n_init": 7}']
    assert report["servers"]["TOKENSELECT"]["settings"] == {"top_k": 99}
    assert report["machine"]["runs"] == "servers and client"
    assert report["model"] == MODEL
    assert str(tmp_path) not in json.dumps(report["servers"])


def test_without_lengths_they_go_as_far_as_the_model_does(started, model):
    few = ("--rounds", "1", "--generations", "1", "--requests", "0", "--output-tokens", "4")
    result = bench("--model", str(model), *few)
    assert result.exit_code == 0, result.output
    asked = [len(body["prompt"]) for body in started[0].small.bodies]
    assert asked == [300, 2048]  # 4,096 and the answer are a token too many
    assert [server.backend for server in started] == [None, "TOKENSELECT"]


def test_a_model_that_is_not_there_is_refused(started):
    result = bench("--model", "/no/model")
    assert result.exit_code == 2
    assert "--model /no/model: " in result.output
    assert not started


def test_servers_share_a_gpu_and_the_user_has_the_last_word(started, model, monkeypatch):
    monkeypatch.setattr(contenders, "has_gpu", lambda: True)
    own = ("--", "--gpu-memory-utilization", "0.3")
    assert bench(*FEW, "--model", str(model), *own).exit_code == 0
    share = "--gpu-memory-utilization"
    assert started[0].extra_args[2:] == [share, "0.45", share, "0.3"]


def test_a_server_that_does_not_start_ends_it_and_stops_the_others(started, model):
    result = bench(*FEW, "--model", str(model), "--", "--refuse")
    assert result.exit_code == 1
    assert "TOKENSELECT: vllm serve ended with status 1" in result.output.replace("\n", " ")
    assert started[0].stopped


def test_where_requests_failed_the_logs_are_kept_and_named(started, model):
    result = bench(*FEW, "--model", str(model), "--baseline", "CPU_ATTN", "--", "--fail")
    assert result.exit_code == 1
    told = result.output.replace("\n", "")
    assert "1 requests of CPU_ATTN failed" in told
    for server in started:
        assert str(server.log_path) in told
        assert server.log_path.exists()
        assert server.stopped

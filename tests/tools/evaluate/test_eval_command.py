"""`tokenselect eval` refuses what it cannot ask before it asks anything, and says what is allowed."""

import json
import re

import pytest
from typer.testing import CliRunner

from tests.tools.common.server import MAX_MODEL_LEN, MODEL, SmallServer, text_of
from vllm_tokenselect.tools.cli.app import app


@pytest.fixture
def server():
    with SmallServer() as started:
        started.says = lambda body: re.search(r"key is (\d+)", text_of(started, body))[1]
        yield started


def evaluate(*arguments: str):
    return CliRunner().invoke(app, ["eval", *arguments])


FEW = ("--tasks", "passkey", "--lengths", "500,900", "--samples", "2", "--depths", "2")


def test_a_served_model_is_measured_drawn_and_written_down(server, tmp_path):
    server.attends = (40, 100)
    file = tmp_path / "eval.json"
    result = evaluate(server.url, *FEW, "--json", str(file), "--plots", str(tmp_path / "plots"))
    assert result.exit_code == 0, result.output
    assert "attended to 40.0% of 400 tokens in context" in result.output
    assert "2/2  1.00 [0.34, 1.00]" in result.output
    written = json.loads(file.read_text())
    (run,) = written["runs"]
    assert run["servers"]["B"]["version"] == "0.32.0"
    assert run["servers"]["B"]["model"] == MODEL
    assert run["asked"]["samples"] == 2
    assert run["attended"]["B"] == {"attended": 160.0, "in_context": 400.0}
    assert {"date", "vllm-tokenselect", "lm-eval", "python"} <= set(run["environment"])
    assert run["command"].split()[0] == "tokenselect"
    assert [row["rate"] for row in written["summary"]] == [1.0, 1.0]
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == [
        "eval-passkey-depths.png",
        "eval-passkey.png",
    ]


def test_one_server_is_compared_with_itself_at_full_attention(server, tmp_path):
    answers = server.says

    def says(body):
        return answers(body) if body.get("vllm_xargs") == {"tokenselect": "off"} else "7"

    server.says = says
    file = tmp_path / "eval.json"
    off = ("--against", server.url, "--against-xargs", '{"tokenselect": "off"}')
    result = evaluate(server.url, *off, *FEW, "--json", str(file))
    assert result.exit_code == 0, result.output
    rows = [row for row in json.loads(file.read_text())["summary"] if row["kind"] == "difference"]
    assert [row["difference"] for row in rows] == [-1.0, -1.0]
    assert "B minus A" in result.output


def test_a_run_is_gone_on_with_only_if_that_was_asked_for(server, tmp_path):
    command = (server.url, *FEW, "--json", str(tmp_path / "eval.json"))
    assert evaluate(*command).exit_code == 0
    asked = len(server.bodies)
    refused = evaluate(*command)
    assert refused.exit_code == 2
    assert "exists: continue it with --resume, or remove it" in refused.output
    assert evaluate(*command, "--resume").exit_code == 0
    assert len(server.bodies) == asked
    other = evaluate(*command, "--resume", "--depths", "3")
    assert other.exit_code == 2
    assert "was made with another depths: depths 2" in other.output


def test_a_failure_in_mid_run_is_an_error_that_keeps_what_was_answered(server, tmp_path):
    file = tmp_path / "eval.json"
    answers = server.says

    def says(body):
        server.failures = [400]
        return answers(body)

    server.says = says
    result = evaluate(server.url, *FEW, "--json", str(file), "--concurrency", "1")
    assert result.exit_code == 1
    assert "answered HTTP 400" in result.output
    assert len(json.loads(file.read_text())["cells"]) == 1


REFUSED = {
    "an unknown task": (
        ("--tasks", "vt,needle"),
        "there is no task 'needle': --tasks takes niah_single_1",
    ),
    "no task": (("--tasks", ","), "there is no task named: --tasks takes"),
    "a length that the model cannot take": (
        ("--lengths", "1024,4096"),
        f"--lengths 4096: {MODEL} at URL takes {MAX_MODEL_LEN} tokens at most",
    ),
    "a length that is none": (("--lengths", "4K"), "--lengths '4K': tokens, separated by commas"),
    "a length that holds no prompt": (
        ("--lengths", "64"),
        "passkey at --lengths 64: 58 tokens cannot",
    ),
    "a model that is not served": (("--model", "large"), f"does not serve 'large', but {MODEL}"),
    "arguments that are no object": (("--xargs", "off"), "--xargs 'off' is no JSON object"),
    "another interface": (
        ("--api", "responses"),
        "--api 'responses': it must be one of completions, chat",
    ),
    "a file that is not there": (("--text", "/no/file"), "/no/file"),
    "a tokenizer that is not there": (("--tokenizer", "/no/folder"), "--tokenizer /no/folder"),
    "more steps than a text has": (
        ("--tasks", "perplexity", "--steps", "900"),
        "perplexity at --lengths 900: --steps 900 leaves nothing before them",
    ),
}


@pytest.mark.parametrize(("arguments", "named"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_asked_is_refused_before_anything_is(server, arguments, named):
    result = evaluate(server.url, *FEW, *arguments)
    assert result.exit_code == 2, result.output
    assert named.replace("URL", server.url) in result.output.replace("\n", " ")
    assert server.bodies == []


def test_a_server_that_does_not_answer_is_refused():
    with SmallServer() as server:
        url = server.url
    result = evaluate(url, *FEW)
    assert result.exit_code == 2
    assert f"{url}/v1/models does not answer" in result.output
    assert "vllm serve MODEL --attention-backend TOKENSELECT" in result.output


def test_one_of_several_models_must_be_named(server):
    server.models = ["small", "other"]
    result = evaluate(server.url, *FEW)
    assert result.exit_code == 2
    assert "serves small, other: name one of them by --model" in result.output
    assert evaluate(f"{server.url}/v1", *FEW, "--model", "small").exit_code == 0


def test_a_server_without_a_tokenizer_needs_one(server):
    server.tokenizes = False
    result = evaluate(server.url, *FEW)
    assert result.exit_code == 2
    assert "has no /tokenize" in result.output
    assert "--tokenizer" in result.output


def test_a_servers_tokenizer_must_be_that_of_the_other(server):
    with SmallServer() as other:
        other.tokenizer.encode("a word that it learned before all others")
        result = evaluate(server.url, *FEW, "--against", other.url)
    assert result.exit_code == 2
    assert "is not that of" in result.output


def test_a_server_that_cannot_tell_log_probabilities_is_refused(server):
    server.masks = True
    result = evaluate(server.url, *FEW, "--tasks", "perplexity", "--steps", "4")
    assert result.exit_code == 2
    assert "raw_logprobs" in result.output

"""Real clients against a server that selects: they notice nothing but what they asked for."""

import http.client
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import openai
import pytest

from tests.server.counted import settled_counts, sums_over

pytestmark = pytest.mark.server

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_completions_stream_the_same_text_as_they_return_whole(sparse_client, prompts, tokenizer):
    request = {
        "model": sparse_client.model,
        "prompt": prompts(201, 1500),
        "max_tokens": 12,
        "temperature": 0,
    }
    whole = sparse_client.openai.completions.create(**request)
    pieces = [
        p.choices[0].text for p in sparse_client.openai.completions.create(**request, stream=True)
    ]
    assert len(pieces) > 1
    assert "".join(pieces) == whole.choices[0].text
    assert whole.usage.prompt_tokens == 1500


def test_chat_streams_the_same_answer_as_it_returns_whole(sparse_client, prompts, tokenizer):
    document = tokenizer.decode(prompts(202, 1200))
    request = {
        "model": sparse_client.model,
        "messages": [{"role": "user", "content": f"{document}\nSay hello."}],
        "max_tokens": 12,
        "temperature": 0,
    }
    whole = sparse_client.openai.chat.completions.create(**request)
    stream = sparse_client.openai.chat.completions.create(**request, stream=True)
    pieces = [p.choices[0].delta.content or "" for p in stream if p.choices]
    assert whole.choices[0].message.content == "".join(pieces)
    assert whole.choices[0].message.content


def test_a_prompt_past_max_model_len_is_refused_and_the_server_unharmed(sparse_client, prompts):
    with pytest.raises(openai.BadRequestError) as refused:
        sparse_client.complete([1000] * 9000, 4)
    assert refused.value.status_code == 400
    assert "8192" in str(refused.value)
    assert len(sparse_client.complete(prompts(203, 100), 4).tokens) == 4


def test_a_client_that_leaves_in_mid_prefill_harms_nobody(sparse_client, prompts, layers):
    prompt = prompts(204, 700)
    before = sparse_client.complete(prompt, 6)
    counted = settled_counts(sparse_client)
    leave_in_mid_prefill(sparse_client, prompts(205, 6500))
    computed = settled_counts(sparse_client) - counted
    whole = sums_over(layers, range(1, 6501), most=6500)
    assert 0 < computed.context < whole, "the client was to leave while its prompt was computed"
    assert sparse_client.complete(prompt, 6).tokens == before.tokens


def leave_in_mid_prefill(client, prompt):
    """Ask for a completion, and close the connection once the prompt is being computed."""
    body = json.dumps({"model": client.model, "prompt": prompt, "max_tokens": 50, "stream": True})
    connection = http.client.HTTPConnection("127.0.0.1", client.server.port)
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    wait_until(lambda: client.metric("vllm:num_requests_running") == 1)
    time.sleep(1)
    connection.close()
    wait_until(lambda: client.metric("vllm:num_requests_running") == 0)


def wait_until(happened, timeout=60, pause=0.1):
    deadline = time.monotonic() + timeout
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(pause)


def test_vllm_bench_serve_runs_against_it(sparse_client):
    finished = subprocess.run(
        [
            *(sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve"),
            *("--base-url", sparse_client.server.base_url, "--model", sparse_client.model),
            *("--dataset-name", "random", "--random-input-len", "800"),
            *("--random-output-len", "8", "--num-prompts", "4", "--disable-tqdm"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env=sparse_client.server.env,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    successful = next(
        line for line in finished.stdout.splitlines() if "Successful requests" in line
    )
    assert successful.split()[-1] == "4"


def test_verify_passes_a_server_that_selects_and_agrees_with_full_attention(sparse_client):
    url = sparse_client.server.base_url
    command = [
        sys.executable,
        "-m",
        "vllm_tokenselect",
        "verify",
        url,
        "--length",
        "1500",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert {check["name"]: check["state"] for check in told["checks"]} == dict.fromkeys(
        ("answers", "agrees", "selects", "is timed"), "pass"
    )
    assert 1350 < told["measured"]["prompt_tokens"] <= 1500
    counts = told["measured"]["counts"]
    assert 0 < counts["attended"] < counts["in_context"]
    assert counts["reselected"] > 0


def run_example(name, *arguments):
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout.splitlines()


def test_the_examples_ask_with_settings_of_their_own_and_read_what_was_attended(
    sparse_client, prompts, tokenizer, tmp_path
):
    document = tmp_path / "document.txt"
    document.write_text(tokenizer.decode(prompts(207, 600)))
    url = sparse_client.server.base_url
    asked = (str(document), "What is this about?", "--top-k", "100", "--max-tokens", "4")
    said = run_example("client.py", url, *asked)
    answers = re.findall(
        r"^(.+): (\S[^\0]+?) \(\d+\.\d\d s to the first token\)$", "\n".join(said), re.M
    )
    assert [settings for settings, _ in answers] == [
        "the settings of the server",
        "{'tokenselect_top_k': 100}",
        "{'tokenselect': 'off'}",
    ]
    time.sleep(2)  # workers publish about once a second
    attended, reused, rows = run_example("metrics.py", url)
    assert 0 < float(attended.split()[2].rstrip("%")) < 100
    assert reused.startswith("reused 0.0%"), "this server has no Selection Cache"
    assert re.fullmatch(r"rows: [1-9]\d* reselected, 0 reused, 0 shared, [1-9]\d* dense", rows)

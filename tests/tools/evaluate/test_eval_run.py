"""A run asks for what is not answered yet, of each server the same, and counts what it got."""

import json
from dataclasses import replace

import pytest

from tests.tools.common.server import MODEL, SmallServer, text_of
from tests.tools.common.words import Words
from vllm_tokenselect.tools.common.client import Endpoint, ServerError
from vllm_tokenselect.tools.common.server_facts import ask_server, selection_counts
from vllm_tokenselect.tools.common.tokenizers import ServerTokenizer
from vllm_tokenselect.tools.evaluate.cells import CellFile
from vllm_tokenselect.tools.evaluate.plots import draw
from vllm_tokenselect.tools.evaluate.questions import EvalSettings
from vllm_tokenselect.tools.evaluate.run import new_client as client_with
from vllm_tokenselect.tools.evaluate.run import refuse_what_a_server_cannot, run, summarize
from vllm_tokenselect.tools.evaluate.tasks import REPLAY, STEPS

SETTINGS = EvalSettings(
    ("passkey", "number_string", "perplexity"),
    (600,),
    samples=4,
    texts=2,
    steps=5,
    depths=2,
    concurrency=2,
    attempts=2,
    timeout=5,
)


def finds(server: SmallServer, blind_to: float = 1.1):
    """Says the number that is hidden in a prompt, if it does not stand too deep."""
    import re

    def says(body):
        text = text_of(server, body)
        found = re.search(r"(?:key|digits) is (\d+)\. Remember", text)
        return f" {found[1]}." if found.start() < blind_to * len(text) else " 7"

    return says


@pytest.fixture
def words():
    return Words()


@pytest.fixture
def servers(words):
    """A, which finds everything, and B, which is blind to the second half."""
    with SmallServer(tokenizer=words) as full, SmallServer(tokenizer=words) as selects:
        full.says, selects.says = finds(full), finds(selects, blind_to=0.5)
        yield {"A": full, "B": selects}


def endpoints_of(servers: dict[str, SmallServer]) -> dict[str, Endpoint]:
    return {name: Endpoint(server.url, MODEL) for name, server in servers.items()}


async def test_both_servers_are_asked_the_same_and_compared(servers, words, tmp_path):
    report = CellFile(tmp_path / "eval.json", {}, False, {})
    await run(endpoints_of(servers), SETTINGS, words, report)
    asked = [sorted(str(body["prompt"]) for body in server.bodies) for server in servers.values()]
    assert asked[0] == asked[1]
    assert len(asked[0]) == 4 + 4 + 2 * 5

    summary = summarize(report.cells)
    rates = {(row["task"], row["method"]): row["rate"] for row in summary if row["kind"] == "rate"}
    assert rates["passkey", "A"] == rates["number_string", "A"] == 1
    assert rates["passkey", "B"] == rates["number_string", "B"] == 0.5
    differences = {row["task"]: row for row in summary if row["kind"] == "difference"}
    passkey = differences["passkey"]
    assert passkey["difference"] == -0.5
    assert (passkey["pairs"], passkey["better"], passkey["worse"]) == (4, 0, 2)
    assert passkey["low"] < -0.5 < passkey["high"]

    means = {row["method"]: row for row in summary if row["kind"] == "mean rate"}
    assert (means["A"]["rate"], means["B"]["rate"]) == (1, 0.5)
    (mean,) = (row for row in summary if row["kind"] == "mean difference")
    assert (mean["difference"], mean["tasks"]) == (-0.5, ["number_string", "passkey"])
    assert passkey["low"] < mean["low"] < -0.5 < mean["high"] < passkey["high"]

    losses = {row["method"]: row for row in summary if row["kind"].startswith("loss")}
    assert losses["A"]["tokens"] == 10
    # The servers' models are the same, so that every loss is.
    assert losses["A"]["loss"] == losses["B"]["loss"] > 0
    assert losses["B - A"]["loss"] == losses["B - A"]["high"] == 0


async def test_a_run_goes_on_with_what_is_missing(servers, words, tmp_path):
    file = tmp_path / "eval.json"
    done: list = []
    settings = replace(SETTINGS, tasks=("passkey",))
    await run(endpoints_of(servers), settings, words, CellFile(file, {}, False, {}), done.append)
    assert len(done) == 8
    before = json.loads(file.read_text())["cells"]

    again: list = []
    report = CellFile(file, {}, True, {})
    await run(endpoints_of(servers), replace(settings, samples=6), words, report, again.append)
    assert len(again) == 4
    assert not set(again) & set(done)
    assert json.loads(file.read_text())["cells"][:8] == before


async def test_what_was_answered_before_a_failure_is_kept(words, tmp_path):
    file = tmp_path / "eval.json"
    settings = replace(SETTINGS, tasks=("passkey",), concurrency=1)
    with SmallServer(tokenizer=words) as server:
        answers = finds(server)

        def says(body):
            # The third is the last that is answered well.
            server.failures = [400] if len(server.bodies) == 3 else []
            return answers(body)

        server.says = says
        endpoints = {"B": Endpoint(server.url, MODEL)}
        with pytest.raises(ServerError, match="HTTP 400"):
            await run(endpoints, settings, words, CellFile(file, {}, False, {}))
        assert len(json.loads(file.read_text())["cells"]) == 3
        server.says = answers
        await run(endpoints, settings, words, CellFile(file, {}, True, {}))
    assert len(json.loads(file.read_text())["cells"]) == 4
    assert len(server.bodies) == 4


async def test_a_run_keeps_to_its_concurrency(words, tmp_path):
    with SmallServer(tokenizer=words, pause=0.02) as server:
        server.says = finds(server)
        settings = replace(SETTINGS, concurrency=3)
        await run(
            {"B": Endpoint(server.url, MODEL)}, settings, words, CellFile(None, {}, False, {})
        )
        assert server.most == 3


async def test_a_chat_is_asked_the_whole_prompt(words):
    with SmallServer(tokenizer=words) as server:
        server.says = finds(server)
        report = CellFile(None, {}, False, {})
        endpoint = Endpoint(server.url, MODEL, chat=True)
        await run({"B": endpoint}, replace(SETTINGS, tasks=("passkey",)), words, report)
        assert all(cell["answers"][0]["right"] == 1 for cell in report.cells)
        text = server.bodies[0]["messages"][0]["content"]
        assert text.startswith("There is an important info")
        assert text.endswith("The pass key is ")


async def test_a_server_that_masks_before_it_counts_is_refused(words):
    with SmallServer(tokenizer=words) as server:
        async with client_with(Endpoint(server.url, MODEL), SETTINGS) as client:
            await refuse_what_a_server_cannot(client, words, [STEPS, REPLAY])
            server.masks = True
            with pytest.raises(ServerError, match="--logprobs-mode raw_logprobs"):
                await refuse_what_a_server_cannot(client, words, [STEPS])
            server.replays = False
            with pytest.raises(ServerError, match="--enable-scale-out --enable-trace-replay"):
                await refuse_what_a_server_cannot(client, words, [REPLAY])


def test_the_servers_own_tokenizer_does_what_a_local_one_does():
    local = Words(chat=True, begins=True)
    with SmallServer(tokenizer=local) as server:
        remote = ServerTokenizer(ask_server(server.url, None))
        text = "Read 12 words."
        assert remote.encode(text) == local.encode(text)
        assert remote.encode(text, add_special_tokens=False) == local.encode(text, False)
        assert remote.decode(local.encode(text, False)) == text
        assert remote.chat_template is not None
        message = [{"role": "user", "content": text}]
        assert remote.apply_chat_template(message) == local.apply_chat_template(message)
        local.chat_template = None
        assert ServerTokenizer(ask_server(server.url, None)).chat_template is None


def test_attended_tokens_are_the_counters_of_all_workers():
    with SmallServer() as server:
        assert selection_counts(server.url) is None
        server.attends, server.bodies = (3, 10), [{}, {}]
        assert selection_counts(server.url) == {"attended": 6, "in_context": 20}
    assert selection_counts(server.url) is None


async def test_pictures_are_drawn_over_length_and_depth(servers, words, tmp_path):
    report = CellFile(None, {}, False, {})
    settings = replace(SETTINGS, lengths=(400, 600), tasks=("passkey", "perplexity"))
    await run(endpoints_of(servers), settings, words, report)
    drawn = draw(summarize(report.cells), report.cells, tmp_path / "plots")
    assert [file.name for file in drawn] == ["eval-passkey.png", "eval-passkey-depths.png"]
    for file in drawn:
        assert file.read_bytes().startswith(b"\x89PNG")
        assert file.stat().st_size > 5000

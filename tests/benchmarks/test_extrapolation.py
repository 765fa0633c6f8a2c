"""What is hidden stands where it is said to, rates have their intervals, and runs can be continued."""

import json
from contextlib import nullcontext

import pytest

from benchmarks.extrapolation import __main__ as extrapolation
from benchmarks.extrapolation.long_text import (
    BLOCK,
    SHORTENED,
    TARGET,
    TEXT,
    Perplexity,
    block_means,
    summarize,
)
from benchmarks.extrapolation.parts import Needles
from benchmarks.extrapolation.plots import draw
from benchmarks.extrapolation.served import (
    FULL,
    NATIVE,
    REASSIGNED,
    SINK_LOCAL,
    OutOfTime,
    served_ways,
)
from benchmarks.report import open_cells
from vllm_tokenselect.config import TokenSelectConfig
from vllm_tokenselect.tools.common.hidden import (
    NEEDLE,
    PASSKEY,
    is_right,
    needle_prompts,
    passkey_prompt,
)
from vllm_tokenselect.tools.common.intervals import wilson
from vllm_tokenselect.tools.common.text import document
from vllm_tokenselect.tools.evaluate.cells import CannotResume, Cell
from vllm_tokenselect.tools.evaluate.rates import rates

CHAT_END = "<|im_end|>\n<|im_start|>assistant\n"


def shared(one: list[int], other: list[int]) -> int:
    """Tokens at the start that two prompts have in common."""
    differ = (i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
    return next(differ, len(one))


@pytest.mark.parametrize("length", [700, 4096])
@pytest.mark.parametrize("depth", [0.0, 0.55, 1.0])
def test_a_passkey_stands_at_its_depth_of_a_prompt_of_the_length(tokenizer, length, depth):
    prompt = passkey_prompt(tokenizer, length, depth, seed=3)
    assert len(prompt.tokens) == length
    sentence = PASSKEY.format(code=prompt.expected)
    assert tokenizer.decode(prompt.tokens[prompt.position :]).startswith(sentence)
    text = tokenizer.decode(prompt.tokens)
    assert text.count(prompt.expected) == 2
    assert text.endswith(f"What is the pass key?{CHAT_END}As written above: The pass key is ")
    # The introduction takes some tokens, and the key stands between sentences.
    assert prompt.depth == pytest.approx(depth, abs=130 / length)


def test_passkeys_of_a_length_share_what_stands_before_them(tokenizer):
    deep, other = (passkey_prompt(tokenizer, 4096, 0.95, seed) for seed in (0, 1))
    shallow = passkey_prompt(tokenizer, 4096, 0.25, seed=0)
    assert deep.expected != other.expected
    assert shared(deep.tokens, other.tokens) >= deep.position
    # The key's sentence and the noise both start with "The".
    assert shared(deep.tokens, shallow.tokens) == shallow.position + 1


@pytest.mark.parametrize("length", [2048, 9000])
def test_each_number_is_asked_for_in_the_same_haystack(tokenizer, length):
    prompts = needle_prompts(tokenizer, length, seed=4)
    assert len(prompts) == 8
    assert len({prompt.expected for prompt in prompts}) == 8
    for index, prompt in enumerate(prompts):
        assert len(prompt.tokens) == length
        text = tokenizer.decode(prompt.tokens)
        assert text.count(prompt.expected) == 1
        _, begun = text.split(CHAT_END)
        sentence = NEEDLE.format(fact=begun.rstrip(), code=prompt.expected)
        assert tokenizer.decode(prompt.tokens[prompt.position :]).startswith(sentence)
        # One in each eighth, but that a paragraph may start a little before or behind.
        assert index / 8 - 0.15 < prompt.depth < (index + 1) / 8 + 0.15
        assert shared(prompts[0].tokens, prompt.tokens) > length - 60


def test_prompts_are_seeded(tokenizer):
    assert needle_prompts(tokenizer, 2048, 1) == needle_prompts(tokenizer, 2048, 1)
    assert needle_prompts(tokenizer, 2048, 1)[0] != needle_prompts(tokenizer, 2048, 2)[0]
    assert passkey_prompt(tokenizer, 2048, 0.5, 1) == passkey_prompt(tokenizer, 2048, 0.5, 1)
    assert document(tokenizer, 1, 2048) != document(tokenizer, 2, 2048)
    # What a shorter context reads is the end of the same tokens.
    assert document(tokenizer, 1, 4096)[:2048] == document(tokenizer, 1, 2048)


def test_what_cannot_be_made_is_refused(tokenizer):
    with pytest.raises(ValueError, match="50 tokens cannot hold the question and the key"):
        passkey_prompt(tokenizer, 50, 0.5, 0)
    with pytest.raises(ValueError, match="120 tokens cannot hold 8 needles"):
        needle_prompts(tokenizer, 120, 0)
    with pytest.raises(ValueError, match="the text has only"):
        document(tokenizer, 0, 10**6)


@pytest.mark.parametrize(
    ("said", "right"),
    [(" 12345.", True), ("12345", True), (" 1234.", False), (" 123456", False), (" a 5", False)],
)
def test_an_answer_is_right_if_its_first_number_is_the_code(said, right):
    assert is_right(said, "12345") == right


@pytest.mark.parametrize(
    ("right", "asked", "low", "high"),
    [
        (8, 10, 0.4902, 0.9433),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (50, 100, 0.4038, 0.5962),
    ],
)
def test_wilson_intervals(right, asked, low, high):
    assert wilson(right, asked) == pytest.approx((low, high), abs=1e-4)


def answered(method: str, length: int, number: int, *right: bool, task: str = "facts") -> dict:
    answers = [{"right": x, "depth": 0.5} for x in right]
    cell = {"method": method, "task": task, "length": length, "number": number, "depth": None}
    return cell | {"answers": answers, "seconds": 2.0}


def test_rates_count_questions_over_haystacks():
    first, second, other = rates(
        [
            answered("a", 4096, 0, True, False),
            answered("a", 4096, 1, True, True),
            answered("a", 512, 0, False),
            answered("b", 4096, 0, True, False),
        ]
    )
    assert (first["length"], first["right"], first["questions"]) == (512, 0, 1)
    assert (second["right"], second["questions"], second["haystacks"]) == (3, 4, 2)
    assert (second["low"], second["high"]) == wilson(3, 4)
    assert (other["method"], other["rate"]) == ("b", 0.5)


def test_losses_are_averaged_over_blocks_of_tokens_of_which_the_first_has_none():
    losses = [1.0] * (BLOCK - 1) + [2.0] * BLOCK + [3.0] * BLOCK
    assert block_means(losses) == [1.0, 2.0, 3.0]


def test_losses_are_compared_on_the_same_tokens():
    blocks, target = 16384 // BLOCK, TARGET // BLOCK

    def cell(task: str, number: int, losses: list[float]) -> dict:
        fixed = {"method": "a", "length": 16384}
        return fixed | {"task": task, "number": number, "losses": losses}

    easy, hard = [2.0] * (blocks - target), [4.0] * target
    summary = summarize(
        [
            cell(TEXT, 0, easy + hard),
            cell(TEXT, 1, easy + hard),
            cell(SHORTENED, 0, [4.5] * target),
            cell(SHORTENED, 1, [5.5] * target),
        ]
    )
    (paired,) = (row for row in summary if row["kind"] == "paired")
    assert (paired["end"], paired["blocks"]) == (16384, 2 * target)
    assert (paired["loss"], paired["loss_with_less"]) == (4.0, 5.0)
    assert paired["difference"] == -1.0
    assert paired["se"] == pytest.approx(0.5 / (2 * target - 1) ** 0.5)
    position = {row["start"]: row["loss"] for row in summary if row["kind"] == "position"}
    assert position == {0: 2.0, 1024: 2.0, 2048: 2.0, 4096: 2.0, 8192: 2.25}


def test_every_method_attends_to_as_much():
    settings = {"top_k": 500, "n_init": 20, "n_local": 100, "query_chunk": 128}
    found = served_ways(settings)
    ours, alone = (
        TokenSelectConfig.from_mapping(found[name].settings).method
        for name in (REASSIGNED, SINK_LOCAL)
    )
    assert ours.max_attended == alone.max_attended
    assert (alone.top_k, alone.reassigns_positions) == (1, True)
    assert found[NATIVE].settings == {"min_context": 0, **settings, "positions": "native"}
    assert found["window"].overrides == {"sliding_window": 620}
    assert [way.name for way in found.values() if way.stays_in_range] == [REASSIGNED, SINK_LOCAL]


def test_needles_are_asked_for_in_an_order_that_shares(smollm2):
    options = ("--passkeys", "4", "--depths", "2", "--samples", "9", "--full-up-to", "8192")
    part = Needles(extrapolation.arguments(["needles", *options]))
    cells = list(part.cells(REASSIGNED))
    passkeys = [cell for cell in cells if cell.task == "passkey" and cell.length == 65536]
    assert [cell.depth for cell in passkeys] == [0.75, 0.75, 0.25, 0.25]
    assert len([cell for cell in cells if cell.task == "facts" and cell.length == 65536]) == 2
    assert {cell.length for cell in part.cells(NATIVE)} == {4096, 8192}
    assert {cell.length for cell in part.cells(FULL)} == {4096, 8192}


def test_texts_are_read_once_and_their_ends_again_with_less_context(smollm2):
    part = Perplexity(extrapolation.arguments(["perplexity", "--samples", "1"]))
    assert list(part.cells(REASSIGNED)) == [Cell(REASSIGNED, TEXT, 65536, 0)]
    read, *again = part.cells(FULL)
    assert read == Cell(FULL, TEXT, 16384, 0)
    assert [cell.length for cell in again] == [8192, 16384, 32768, 65536]


class FakePart:
    """A part of four cells, which runs out of time where it is told to."""

    model = None

    def __init__(self, stop_at: int | None = None) -> None:
        self.asked: list[int] = []
        self.stop_at = stop_at

    def cells(self, method):
        return (Cell(method, "facts", 512, number) for number in range(4))

    def ask(self, asker, cell):
        if cell.number == self.stop_at:
            raise OutOfTime
        self.asked.append(cell.number)
        return {"answers": [{"right": True}]}


def test_a_run_that_was_stopped_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(extrapolation, "server", lambda *_: nullcontext())
    monkeypatch.setattr(extrapolation, "Asker", lambda *_: None)
    args = extrapolation.arguments(["constructed"])
    file = tmp_path / "report.json"
    way = [served_ways({})[FULL]]

    part = FakePart(stop_at=2)
    assert not extrapolation.run(part, way, open_cells(file, {"part": "x"}, False), args)
    assert [cell["number"] for cell in json.loads(file.read_text())["cells"]] == [0, 1]

    part = FakePart()
    report = open_cells(file, {"part": "x"}, True)
    assert extrapolation.run(part, way, report, args)
    assert part.asked == [2, 3]
    report.write(rates(report.cells))
    written = json.loads(file.read_text())
    assert len(written["cells"]) == 4
    assert len(written["runs"]) == 2
    assert written["summary"][0]["questions"] == 4
    assert {"command", "environment"} <= set(written["runs"][0])


def test_a_report_is_not_lost_and_not_mixed_with_another(tmp_path):
    file = tmp_path / "report.json"
    open_cells(file, {"dtype": "bfloat16"}, False).add(Cell("a", "facts", 1, 0), {"answers": []})
    with pytest.raises(CannotResume, match="exists: continue it with --resume, or remove it"):
        open_cells(file, {"dtype": "bfloat16"}, False)
    with pytest.raises(CannotResume, match="made with another dtype: dtype 'bfloat16'"):
        open_cells(file, {"dtype": "float32"}, True)


def test_reports_are_drawn(tmp_path):
    cells = [
        answered(method, length, number, True, False, task="facts")
        for method in ("a", "b")
        for length in (512, 1024)
        for number in range(2)
    ]
    passkeys = [
        answered("a", 512, 0, True, task="passkey") | {"depth": depth} for depth in (0.25, 0.75)
    ]
    drawn = draw("needles", rates(cells + passkeys), cells + passkeys, tmp_path)
    assert [file.name for file in drawn] == [
        "extrapolation-needles-facts.png",
        "extrapolation-needles-passkey.png",
        "extrapolation-needles-depths.png",
    ]
    losses = {"number": 0, "depth": None, "method": "a", "length": 8192}
    texts = [
        {**losses, "task": TEXT, "losses": [2.0, 3.0] * (4096 // BLOCK)},
        {**losses, "task": SHORTENED, "losses": [2.0, 3.0] * (TARGET // BLOCK // 2)},
    ]
    drawn += draw("perplexity", summarize(texts), texts, tmp_path)
    assert all(file.stat().st_size > 5000 for file in drawn)

"""What `benchmarks.accuracy` says of a way of attending is what the model makes of it."""

from dataclasses import replace

import pytest
import torch

from benchmarks.accuracy import __main__ as accuracy
from benchmarks.accuracy.figures import summarize, table
from benchmarks.accuracy.questions import QUESTIONS, digits_only
from benchmarks.accuracy.ways import FULL, find_way, split, ways
from vllm_tokenselect.tools.common.hidden import needle_prompts
from vllm_tokenselect.tools.evaluate.cells import Cell
from vllm_tokenselect.tools.inspect.model import DiagnosedModel
from vllm_tokenselect.tools.inspect.selections import Chunk, by_vote, chunks_of

BUDGET = 256
HEADS, KV_HEADS, HEAD_SIZE = 6, 2, 16


@pytest.mark.parametrize("budget", [256, 512, 1024])
def test_every_way_attends_to_as_many_tokens_before_a_chunk(budget):
    generator = torch.Generator().manual_seed(0)
    length = 4 * budget
    key = torch.randn(KV_HEADS, length, HEAD_SIZE, generator=generator)
    for way in ways([budget]).values():
        if way.method is None:
            continue
        chunk = next(c for c in chunks_of(way.method, length, length) if c.candidates is not None)
        query = torch.randn(HEADS, chunk.end - chunk.start, HEAD_SIZE, generator=generator)
        chosen = way.selecting(3)(chunk, query, key, 0.25).tolist()
        assert chosen == sorted(set(chosen))
        assert set(chosen) <= set(chunk.candidates), way.name
        local = chunk.start - chunk.candidates.stop
        assert way.method.n_init + len(chosen) + local == budget, way.name


def test_votes_of_another_kind_choose_other_tokens_and_neighbors_of_a_loud_one():
    key = torch.zeros(KV_HEADS, 200, HEAD_SIZE)
    key[:, 90] = 5.0
    chunk = Chunk(180, 190, range(8, 150), 3)
    query = torch.ones(HEADS, 10, HEAD_SIZE)
    found = ways([BUDGET])
    chosen = {
        name: found[f"{BUDGET} {name}"].selecting(0)(chunk, query, key, 1.0).tolist()
        for name in ("ours", "smoothed 3", "loudest head")
    }
    assert chosen.pop("smoothed 3") == [89, 90, 91]
    assert all(90 in tokens for tokens in chosen.values())


def test_random_draws_anew_for_every_layer_and_alike_for_every_run():
    chunk = Chunk(180, 190, range(8, 150), 30)
    inputs = (torch.ones(HEADS, 10, HEAD_SIZE), torch.ones(KV_HEADS, 200, HEAD_SIZE), 1.0)
    random = ways([BUDGET])[f"{BUDGET} random"]
    first, again = random.selecting(5), random.selecting(5)
    layers = [first(chunk, *inputs).tolist() for _ in range(2)]
    assert layers[0] != layers[1]
    assert [again(chunk, *inputs).tolist() for _ in range(2)] == layers


def test_dense_layers_are_left_to_the_model():
    attention = find_way("dense 2", BUDGET).attention(1024, 0, 0)
    query, key = torch.randn(HEADS, 1024, HEAD_SIZE), torch.randn(KV_HEADS, 1024, HEAD_SIZE)
    assert [attention(layer, query, key, key, 1.0) is None for layer in (0, 1, 2)] == [
        True,
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("name", "dense", "anchors"),
    [
        ("dense 2", 2, 1),
        ("anchors 4", 0, 4),
        ("anchors 2 6 14", 0, (2, 6, 14)),
        ("dense 2 anchors 4", 2, 4),
    ],
)
def test_a_way_is_named_by_its_layers(name, dense, anchors):
    way = find_way(name, BUDGET)
    assert way.name == f"{BUDGET} {name}"
    assert way.method == replace(split(BUDGET), dense_layers=dense, anchor_layers=anchors)


@pytest.mark.parametrize("name", ["", "anchors", "dense", "anchors 4 dense 2", "anchors x", "our"])
def test_a_way_that_does_not_exist_is_refused(name, capsys):
    with pytest.raises(SystemExit):
        accuracy.arguments(["--ways", name])
    assert f"there is no way {name!r}" in capsys.readouterr().err


def test_digits_attend_to_what_the_anchor_selected_and_prompts_select_in_every_layer():
    length, digits, layers = 1024, 3, 4
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(HEADS, length, HEAD_SIZE, generator=generator)
    keys = torch.randn(layers, KV_HEADS, length, HEAD_SIZE, generator=generator)

    def attend(name: str) -> list[torch.Tensor]:
        attention = find_way(name, BUDGET).attention(length, digits, 0)
        return [attention(layer, query, key, key, 1.0) for layer, key in enumerate(keys)]

    every, shared = attend("ours"), attend("anchors 0 2")
    prompt = slice(0, length - digits)
    for layer in range(layers):
        assert torch.equal(every[layer][:, prompt], shared[layer][:, prompt])
        same = torch.equal(every[layer][:, -digits:], shared[layer][:, -digits:])
        assert same == (layer in (0, 2))


def test_questions_keep_the_length_and_tell_the_fact_where_they_say(tokenizer):
    for name, wording in QUESTIONS.items():
        for prompt in needle_prompts(tokenizer, 1024, 2, wording=wording):
            assert len(prompt.tokens) == 1024
            text = tokenizer.decode(prompt.tokens)
            assert text.count(prompt.expected) == 1
            sentence = text[: text.index(prompt.expected)].rstrip().splitlines()[-1]
            before, after = text.split(f"{sentence} {prompt.expected}")
            assert (sentence in before, sentence in after) == {
                "first": (True, False),
                "both": (True, True),
            }.get(name, (False, True))


def test_a_selection_finds_what_a_random_one_does_not_and_questions_share_the_reading():
    args = accuracy.arguments(["--questions", "2"])
    reader = accuracy.Reader(args)
    found = ways([BUDGET])
    said = {
        name: reader.ask(found[name], Cell(name, "end", 1300, 3))["answers"]
        for name in (FULL, f"{BUDGET} ours", f"{BUDGET} random")
    }
    full, ours, random = said.values()
    assert all(answer["right"] for answer in full)
    assert [answer["loss"] for answer in ours] == pytest.approx([0.0, 0.0], abs=0.2)
    assert not any(answer["right"] for answer in random)
    assert min(answer["loss"] for answer in random) > 1


def test_an_answer_is_what_the_model_says_by_itself(tokenizer, smollm2):
    reader = accuracy.Reader(accuracy.arguments(["--questions", "2", "--dtype", "float32"]))
    prompts = needle_prompts(tokenizer, 700, 3, 2)
    model = DiagnosedModel(str(smollm2), dtype="float32")
    for prompt, answer in zip(
        prompts, reader.ask(ways([])[FULL], Cell(FULL, "end", 700, 3))["answers"], strict=True
    ):
        tokens = list(prompt.tokens)
        read = model.read(tokens[:-1])
        for _ in range(6):
            tokens.append(int(model.logits([*tokens, 0], 1, beginning=read).argmax()))
        said = tokenizer.decode(tokens[len(prompt.tokens) :])
        assert answer["right"] == (said[:5] == prompt.expected and not said[5].isdigit())


def test_differences_are_those_from_full_attention_on_the_same_texts():
    def cell(method: str, number: int, *right: bool) -> dict:
        answers = [{"right": r, "loss": 0.0 if r else 2.0, "depth": 0.5} for r in right]
        return {
            "method": method,
            "task": "end",
            "length": 2304,
            "number": number,
            "depth": None,
            "answers": answers,
            "seconds": 1.0,
        }

    cells = [
        cell(FULL, 1, True, True),
        cell(FULL, 2, True, False),
        cell(FULL, 3, False, False),  # the other was not asked yet
        cell("512 ours", 1, True, False),
        cell("512 ours", 2, True, False),
    ]
    rows = {row["method"]: row for row in summarize(cells)}
    assert rows[FULL]["rate"] == 0.5
    ours = rows["512 ours"]
    assert (ours["right"], ours["questions"], ours["haystacks"]) == (2, 4, 2)
    assert ours["right_added"] == pytest.approx(-0.25)
    assert ours["loss_added"] == pytest.approx(0.5)
    assert ours["loss_low"] < 0.5 < ours["loss_high"]
    assert "right_added" not in rows[FULL]
    assert table(list(rows.values())).row_count == 2


def test_ways_that_leave_nothing_out_are_not_asked():
    args = accuracy.arguments(["--budgets", "512", "2048", "--ways", "full", "ours"])
    assert [way.name for way in accuracy.asked_ways(args, 1280)] == ["full", "512 ours"]
    assert [way.name for way in accuracy.asked_ways(args, 4352)] == [
        "full",
        "512 ours",
        "2048 ours",
    ]
    assert ways([512])["512 paper"].method == replace(split(512), tail_queries=0)
    assert ways([512])["512 ours"].selecting(0) is by_vote


def test_digits_are_tokens(tokenizer):
    assert {tokenizer.decode([token]) for token in digits_only(tokenizer)} == set("0123456789")

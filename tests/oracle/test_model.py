"""The oracle itself: a Llama when it attends to everything, the method's definition when it selects."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.oracle.model import OracleModel, Selection, attended_positions, query_chunks
from tests.oracle.prompts import prompt_tokens

SMALL = Selection(
    top_k=3,
    n_init=1,
    n_local=2,
    query_chunk=4,
    tail_queries=2,
    similarity_threshold=0.9,
    refresh_interval=2,
)


@pytest.mark.parametrize("positions", ["native", "reassigned"])
def test_with_a_budget_that_covers_the_context_it_is_transformers_llama(
    smollm2, tokenizer, positions
):
    prompt = prompt_tokens(tokenizer, seed=1, length=300)
    everything = Selection(10**9, 0, 1, 512, 0, 1.0, 0, positions)
    tokens, logprobs, *_ = OracleModel(smollm2, everything).generate(prompt, 5)
    llama = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    with torch.inference_mode():
        logits = llama(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
    expected = logits.log_softmax(-1)
    assert expected.argmax(-1).tolist() == tokens
    assert (expected.max(-1).values - torch.tensor(logprobs)).abs().max() < 1e-3


def test_a_small_budget_changes_what_is_said_with_what_certainty(smollm2, tokenizer):
    prompt = prompt_tokens(tokenizer, seed=2, length=600)
    full = OracleModel(smollm2, None).generate(prompt, 4)
    sparse = OracleModel(smollm2, Selection(64, 16, 64, 64, 16, 1.0, 0)).generate(prompt, 4)
    assert max(abs(a - b) for a, b in zip(full[1], sparse[1], strict=True)) > 1e-2


def test_chunks_lie_at_multiples_and_end_where_the_tail_begins():
    chunks = query_chunks(0, 13, prompt_len=12, settings=SMALL)
    assert [(c.start, c.stop) for c in chunks] == [
        (0, 4),
        (4, 8),
        (8, 10),
        (10, 11),
        (11, 12),
        (12, 13),
    ]


def test_sink_selected_and_local_tokens_are_attended_and_ties_go_to_the_lower_position():
    keys = torch.zeros(1, 12, 4)
    keys[0, 5, 0] = 1.0  # the one key that the query likes; all others tie
    query = torch.tensor([[[1.0, 0, 0, 0]]])
    seen, *_ = attended_positions(query, keys, range(11, 12), 1.0, SMALL, None)
    assert seen.tolist() == [0, 1, 2, 5, 9, 10, 11]


def test_candidates_that_fit_the_budget_make_a_chunk_dense():
    for tokens, dense in ((7, True), (8, False)):
        keys, query = torch.randn(1, tokens, 4), torch.randn(1, 1, 4)
        seen, last, _ = attended_positions(query, keys, range(tokens - 1, tokens), 1.0, SMALL, None)
        assert len(seen) == 7
        assert (last is None) == dense


def test_a_selection_is_reused_while_queries_resemble_each_other_and_it_is_not_too_old():
    keys, query = torch.randn(2, 30, 4), torch.randn(1, 4, 4)
    first, last, _ = attended_positions(query, keys[:, :20], range(19, 20), 1.0, SMALL, None)
    for position, other, reused in (
        (21, query, True),
        (22, query, False),  # three tokens have left the local window
        (20, -query, False),
        (20, torch.cat([query[:, :2], -query[:, 2:]], dim=1), False),  # one KV head of two
    ):
        chunk = range(position, position + 1)
        seen, *_ = attended_positions(other, keys[:, : position + 1], chunk, 1.0, SMALL, last)
        assert (seen.tolist() == [*first.tolist(), *range(20, position + 1)]) == reused


def test_only_reassigned_positions_turn_the_query_that_votes():
    model = object.__new__(OracleModel)
    model.settings = replace(SMALL, positions="reassigned", n_local=2)
    angles = torch.outer(torch.arange(12).float(), torch.tensor([1.0, 0.1]).repeat(2))
    model.cos, model.sin = angles.cos(), angles.sin()
    mean = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    torch.testing.assert_close(model._asking(mean), model._rotate(mean[None], 2)[0])
    model.settings = SMALL
    assert model._asking(mean) is mean


LAYERS = 5


def attended_by_layers(settings: Selection, chunk: range, prompt_len: int) -> list[list[int]]:
    """What a chunk attends to in five layers, each with keys of its own."""
    model = object.__new__(OracleModel)
    model.settings, model.prompt_len = settings, prompt_len
    model.last, model.anchored = [None] * LAYERS, {}
    model.num_reused, model.margin = 0, 1.0
    queries = torch.ones(len(chunk), 1, 4)
    keys = torch.randn(LAYERS, 1, chunk.stop, 4, generator=torch.Generator().manual_seed(0))
    return [
        model.attend_to(layer, queries, keys[layer], chunk, 1.0).tolist() for layer in range(LAYERS)
    ]


def test_a_generated_token_attends_to_what_the_anchor_below_selected():
    chunk = range(40, 41)
    every = attended_by_layers(SMALL, chunk, prompt_len=40)
    assert len(set(map(tuple, every))) == LAYERS, "the layers are to be told apart"
    shared = attended_by_layers(replace(SMALL, anchor_layers=(0, 3)), chunk, prompt_len=40)
    assert shared == [every[0], every[0], every[0], every[3], every[3]]


@pytest.mark.parametrize("chunk", [range(36, 40), range(41, 42)], ids=["chunk", "tail"])
def test_a_prompt_selects_in_every_layer_whatever_its_length(chunk):
    shared = replace(SMALL, anchor_layers=(0, 3), min_context=100)
    every = attended_by_layers(SMALL, chunk, prompt_len=42)
    assert len(set(map(tuple, every))) == LAYERS
    assert attended_by_layers(shared, chunk, prompt_len=42) == every


def test_the_first_layer_that_selects_is_an_anchor_and_dense_ones_are_none():
    settings = replace(SMALL, anchor_layers=(1, 4), dense_layers=2)
    every = attended_by_layers(SMALL, range(40, 41), prompt_len=40)
    found = attended_by_layers(settings, range(40, 41), prompt_len=40)
    assert found == [list(range(41)), list(range(41)), every[2], every[2], every[4]]


@pytest.mark.parametrize("anchors", ["all", (0, 3)], ids=str)
def test_up_to_min_context_a_generated_token_attends_to_everything(anchors):
    settings = replace(SMALL, anchor_layers=anchors, min_context=41)
    everything = [list(range(41))] * LAYERS
    assert attended_by_layers(settings, range(40, 41), prompt_len=40) == everything
    found = attended_by_layers(settings, range(41, 42), prompt_len=40)
    assert found == attended_by_layers(replace(settings, min_context=0), range(41, 42), 40)
    assert all(len(seen) == 7 for seen in found)

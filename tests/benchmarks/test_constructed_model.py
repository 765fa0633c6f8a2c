"""The constructed model recalls what it attends to at a near position, and nothing else."""

from itertools import pairwise

import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks.extrapolation.constructed_model import (
    TRAINED_RANGE,
    RetrievalPrompt,
    retrieval_prompts,
    write_constructed_model,
)
from tests.oracle.model import OracleModel, Selection

LENGTH = 700
SINK, LOCAL = 16, 128
SELECTION = Selection(
    top_k=64,
    n_init=SINK,
    n_local=LOCAL,
    query_chunk=128,
    tail_queries=2,
    similarity_threshold=1.0,
    refresh_interval=0,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """With so little to compute threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_constructed_model(tmp_path_factory.mktemp("constructed"), dtype="float32")


@pytest.fixture(scope="module")
def model(folder):
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def prompts() -> list[RetrievalPrompt]:
    """Their keys stand neither in the sink nor in the local window."""
    found = [prompt for seed in range(3) for prompt in retrieval_prompts(seed, LENGTH, num_keys=3)]
    return [p for p in found if SINK < p.position < LENGTH - 2 * LOCAL]


@torch.inference_mode()
def says(model, prompt: RetrievalPrompt, **how) -> int:
    return int(model(torch.tensor([prompt.tokens]), **how).logits[0, -1].argmax())


def test_full_attention_recalls_every_value(model, prompts):
    assert len(prompts) >= 4
    assert all(says(model, prompt) == prompt.answer for prompt in prompts)


def test_the_sink_and_the_local_window_alone_recall_none(model, prompts):
    query, key = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)[None]
    seen = (key <= query) & ((key < SINK) | (key > query - LOCAL))
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
    right = [says(model, prompt, attention_mask=mask) == prompt.answer for prompt in prompts]
    # One of 256 tokens is right by chance.
    assert sum(right) <= 1


def test_far_positions_lose_what_near_ones_recall(model, prompts):
    for prompt in prompts:
        behind_the_value = torch.arange(LENGTH) > prompt.position + 2
        near = torch.arange(LENGTH) + 100 * behind_the_value
        far = torch.arange(LENGTH) + 8 * TRAINED_RANGE * behind_the_value
        assert says(model, prompt, position_ids=near[None]) == prompt.answer
        assert says(model, prompt, position_ids=far[None]) != prompt.answer


@pytest.mark.parametrize("positions", ["native", "reassigned"])
def test_selection_recalls_every_value(folder, prompts, positions):
    settings = Selection(**{**vars(SELECTION), "positions": positions})
    oracle = OracleModel(folder, settings)
    assert all(int(oracle.start(p.tokens).argmax()) == p.answer for p in prompts)


def test_selection_of_nothing_recalls_none(folder, prompts):
    oracle = OracleModel(folder, Selection(**{**vars(SELECTION), "top_k": 0}))
    right = [int(oracle.start(p.tokens).argmax()) == p.answer for p in prompts]
    assert sum(right) <= 1


@pytest.mark.parametrize(("length", "num_keys"), [(512, 1), (513, 4), (20_000, 8)])
def test_prompts_ask_for_what_they_say_where_they_say(length, num_keys):
    prompts = retrieval_prompts(5, length, num_keys)
    assert len(prompts) == num_keys
    assert len({prompt.key for prompt in prompts}) == num_keys
    for prompt in prompts:
        assert len(prompt.tokens) == length
        assert tuple(prompt.tokens[prompt.position :][:2]) == prompt.key
        assert prompt.tokens[prompt.position + 2] == prompt.answer
        asked = [i for i, pair in enumerate(pairwise(prompt.tokens)) if pair == prompt.key]
        assert asked == [prompt.position, length - 2]
    assert len({tuple(prompt.tokens[:-2]) for prompt in prompts}) == 1


def test_prompts_are_seeded():
    assert retrieval_prompts(1, 600, 2) == retrieval_prompts(1, 600, 2)
    assert retrieval_prompts(1, 600, 2) != retrieval_prompts(2, 600, 2)
    depths = [prompt.depth for seed in range(100) for prompt in retrieval_prompts(seed, 200, 2)]
    assert min(depths) < 0.1
    assert max(depths) > 0.9
    assert sum(depths) / len(depths) == pytest.approx(0.5, abs=0.06)

"""Figures of `benchmarks.continuation` are what they are said to be."""

from math import log

import pytest
import torch

from benchmarks.continuation import __main__ as continuation
from benchmarks.continuation.figures import compare, divergence, summarize, table
from benchmarks.continuation.served import Continuation
from benchmarks.continuation.ways import ALL, DEFAULT, FULL, OFF, SINK_LOCAL, served_ways
from vllm_tokenselect.config import TokenSelectConfig


def listed(logprobs: torch.Tensor, count: int, *others: int) -> dict[int, float]:
    """The most likely tokens, and others, as a server lists them."""
    return {
        int(token): float(logprobs[token]) for token in (*logprobs.topk(count).indices, *others)
    }


@pytest.mark.parametrize("seed", range(5))
def test_divergence_of_listed_tokens_is_never_more_than_over_all_tokens(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(100, generator=generator)
    full = logits.log_softmax(-1)
    other = (logits + torch.randn(100, generator=generator)).log_softmax(-1)
    whole = float((full.exp() * (full - other)).sum())
    found = divergence(listed(full, 5), listed(other, 5))
    assert 0 < found <= whole
    everything = divergence(listed(full, 100), listed(other, 100))
    assert everything == pytest.approx(whole, abs=1e-4)
    assert divergence(listed(full, 5), listed(full, 5)) == 0.0


def test_tokens_that_another_would_replace_are_told_and_lost_likelihood_is_counted():
    def says(*probabilities: float) -> list[dict[int, float]]:
        return [{7: log(p), 8: log(0.9 - p)} for p in probabilities]

    full = Continuation([7, 7, 7], says(0.6, 0.6, 0.6))
    other = Continuation([7, 7, 7], says(0.6, 0.3, 0.3))
    found = compare(full, other)
    assert found["leaves"] == [1, 2]
    assert found["loss"] == [pytest.approx(2 / 3 * log(2), abs=1e-4)]
    assert found["kl"][0] > 0
    cells = [
        {"method": FULL, "task": "text", "length": 9, "number": 0},
        {"method": ALL, "task": "text", "length": 9, "number": 0, **found},
        {"method": ALL, "task": "text", "length": 9, "number": 1, **compare(full, full)},
    ]
    [row] = summarize(cells, 3)
    assert (row["texts"], row["same"]) == (2, 1)
    assert row["others"] == pytest.approx(1 / 3)
    assert row["first"] == 2.0  # 1, and 3 for the text that it never leaves
    assert table([row], 3).row_count == 1


def test_ways_spend_the_same_budget_and_a_profile_has_its_settings(tmp_path):
    profile = tmp_path / "small.json"
    profile.write_text('{"settings": {"top_k": 736, "dense_layers": 2, "anchor_layers": 4}}')
    found = served_ways([profile])
    methods = {
        name: TokenSelectConfig.from_mapping(way.settings).method
        for name, way in found.items()
        if way.settings is not None
    }
    assert methods[ALL].attended_before == methods[SINK_LOCAL].attended_before
    assert (methods[ALL].min_context, methods[SINK_LOCAL].min_context) == (0, 0)
    assert methods[DEFAULT].min_context > 0
    assert methods["small"].anchor_layers == 4
    assert methods["small"].attended_before == methods["small sink+local"].attended_before
    assert methods["small"].min_context == methods["small sink+local"].min_context
    assert methods["small sink+local"].dense_layers == 2
    assert found[OFF].xargs == {"tokenselect": "off"}
    args = continuation.arguments(["--profiles", str(profile)])
    assert args.ways == [name for name in found if name != FULL]

"""Layouts that are compared are possible, and the one that is taken follows from their numbers."""

from dataclasses import replace

import pytest
import torch

from tests.tools.plan.sized import server, tiny_model
from vllm_tokenselect.config import TokenSelectConfig
from vllm_tokenselect.tools.plan.choice import compare_layouts
from vllm_tokenselect.tools.plan.layouts import Layout, cut_stages, find_layouts, why_impossible
from vllm_tokenselect.tools.plan.memory import gpu_memory
from vllm_tokenselect.tools.plan.models import read_model
from vllm_tokenselect.tools.plan.planned_server import find_gpu

LARGE = {"max_num_seqs": 1024, "max_num_batched_tokens": 8192}


def taken(name: str, gpus: int, context: int, machine: int = 8, **changed: object):
    asked = server(context=context, **{**LARGE, **changed})
    comparison = compare_layouts(read_model(name), asked, gpus, machine)
    return comparison, comparison.recommended and comparison.recommended.layout


@pytest.mark.parametrize("gpus", [1, 2, 6, 8, 64])
def test_every_layout_uses_the_gpus_that_there_are(tmp_path, gpus):
    model = tiny_model(tmp_path)
    for layout in find_layouts(model, gpus, 8):
        assert layout.gpus == gpus
        assert layout.tp <= 8
        assert not why_impossible(model, layout)


def test_pipelines_begin_where_kv_heads_end_or_without_tensor_parallelism(tmp_path):
    found = {(one.tp, one.pp) for one in find_layouts(tiny_model(tmp_path), 8, 8)}
    assert found == {(1, 1), (2, 1), (4, 1), (8, 1), (2, 2), (2, 4)}
    deep = tiny_model(tmp_path, num_hidden_layers=8)
    assert (1, 8) in {(one.tp, one.pp) for one in find_layouts(deep, 8, 8)}


def test_what_is_given_is_kept(tmp_path):
    model = tiny_model(tmp_path)
    assert find_layouts(model, 8, 8, tp=2, pp=2) == [Layout(2, 2, 2)]
    assert find_layouts(model, 8, 8, tp=2, pp=2, replicas=1) == [Layout(2, 2, 1)]
    assert {one.tp for one in find_layouts(model, 8, 8, tp=4)} == {4}
    assert {one.pp for one in find_layouts(model, 8, 8, pp=2)} == {2}


IMPOSSIBLE = {
    "tp 3 does not divide 8 heads": {"tp": 3},
    "pp 7 is more than 6 layers": {"tp": 1, "pp": 7},
    "tp 4 x pp 4 takes 16": {"tp": 4, "pp": 4},
    "tp 4 x pp 1 x 3 replicas takes 12": {"tp": 4, "replicas": 3},
}


@pytest.mark.parametrize("reason", IMPOSSIBLE)
def test_what_cannot_be_is_refused_with_the_reason(tmp_path, reason):
    with pytest.raises(ValueError, match=f"on 8 GPUs: {reason}"):
        find_layouts(tiny_model(tmp_path), 8, 8, **IMPOSSIBLE[reason])


def test_heads_that_kv_heads_do_not_divide_are_no_layout(tmp_path):
    model = tiny_model(tmp_path, num_attention_heads=12, num_key_value_heads=4, hidden_size=192)
    assert "do not divide each other" in why_impossible(model, Layout(6, 1, 1))


def test_a_model_that_one_gpu_holds_well_is_replicated():
    comparison, layout = taken("llama-3.1-8b", 8, 131072)
    assert layout == Layout(1, 1, 8)
    assert "one GPU holds enough of them" in comparison.reason


def test_a_context_that_one_gpu_does_not_hold_is_spread_over_several():
    comparison, layout = taken("llama-3.1-8b", 8, 1 << 20)
    assert layout == Layout(4, 1, 2)
    alone = comparison.plans[0]
    assert alone.layout == Layout(1, 1, 8)
    assert alone.contexts == 0
    assert alone.memory.missing > 0


def test_fewer_gpus_a_server_are_taken_when_they_hold_nearly_as_much():
    comparison, layout = taken("llama-3.1-70b", 8, 131072)
    contexts = {plan.layout: plan.contexts for plan in comparison.plans}
    assert layout == Layout(4, 1, 2)
    assert contexts[Layout(2, 1, 4)] < 0.8 * max(contexts.values()) <= contexts[layout]
    assert f"Most: {max(contexts.values())}, tp 8 x pp 1." in comparison.reason


def test_machines_are_joined_only_where_none_holds_a_context():
    config = TokenSelectConfig.from_mapping({"workspace_mb": 1024})
    comparison, layout = taken("llama-3.1-405b", 64, 1 << 20, config=config)
    assert layout is not None
    assert (layout.tp, layout.pp > 1) == (8, True)
    assert "no server within one machine" in comparison.reason
    _, inside = taken("llama-3.1-70b", 64, 131072)
    assert inside == Layout(4, 1, 16)


def test_stages_read_in_turn_and_tensor_parallel_gpus_at_once():
    comparison, _ = taken("llama-3.1-8b", 8, 131072)
    plans = {(plan.layout.tp, plan.layout.pp): plan for plan in comparison.plans}
    alone, wide, deep = plans[1, 1], plans[8, 1], plans[1, 8]
    assert deep.read_in_turn == alone.read_in_turn
    assert wide.read_in_turn < 0.15 * alone.read_in_turn
    assert wide.traffic.decoding.total > 10 * deep.traffic.decoding.total
    assert deep.votes == 0 < wide.votes


def test_a_server_holds_as_many_contexts_as_its_fullest_stage(tmp_path):
    model = tiny_model(tmp_path, num_hidden_layers=7)
    asked = server(context=1 << 19, gpu=find_gpu("8GiB"), max_num_seqs=100)
    (plan,) = compare_layouts(model, asked, 2, 8, tp=1, pp=2).plans
    stages = [gpu_memory(model, asked, plan.layout, s) for s in cut_stages(model.layers, 2)]
    held = [stage.num_contexts(100) for stage in stages]
    assert held[0] < held[1]  # four layers and three
    assert plan.contexts == held[0]


def test_what_would_fit_does_fit(tmp_path):
    gpu = find_gpu("2400MiB")
    asked = server(context=1 << 19, gpu=gpu, reserve=1 << 30)
    comparison = compare_layouts(tiny_model(tmp_path), asked, 1, 8)
    assert comparison.recommended is None
    missing = comparison.plans[0].memory.missing
    assert missing > 0
    assert "are missing. What would fit: " in comparison.reason
    fits = comparison.reason.split("What would fit: ")[1].rstrip(".").split("; ")
    assert fits[0] == "--kv-cache-dtype fp8"
    changed = [
        replace(asked, kv_dtype=torch.float8_e4m3fn),
        replace(asked, context=int(fits[-1].removeprefix("--context "))),
    ]
    for server_that_fits in changed:
        assert compare_layouts(tiny_model(tmp_path), server_that_fits, 1, 8).recommended
    assert "--gpus 2 --tp 2 --pp 1" in fits
    assert compare_layouts(tiny_model(tmp_path), asked, 2, 8, tp=2, pp=1).recommended
    enough = replace(gpu, memory=int((gpu.memory * 0.9 + missing) / 0.9) + 2)
    assert compare_layouts(tiny_model(tmp_path), replace(asked, gpu=enough), 1, 8).recommended
    short = replace(enough, memory=enough.memory - 4)
    assert not compare_layouts(tiny_model(tmp_path), replace(asked, gpu=short), 1, 8).recommended


def test_layouts_whose_scores_do_not_fit_are_left_out_and_named():
    comparison, _ = taken("llama-3.1-405b", 8, 1 << 20)
    refused = {layout for layout, _ in comparison.refused}
    assert refused == {Layout(1, 1, 8), Layout(1, 8, 1)}
    assert all("workspace_mb" in reason for _, reason in comparison.refused)

"""The cost model follows from what a layer launches; its sums, and its figures for full attention."""

import itertools
import json
from dataclasses import replace
from functools import partial

import pytest

from benchmarks.attention.cases import SHAPES, Work
from benchmarks.gpu_cost.__main__ import main
from benchmarks.gpu_cost.estimate import figures
from benchmarks.gpu_cost.gpu import Cost, Gpu
from benchmarks.gpu_cost.kernels import PRICES, UnknownKernel, cost_of
from benchmarks.gpu_cost.recording import Launch, recording
from benchmarks.gpu_cost.steps import ROLES, Case, Role, method_of, record_layer
from vllm_tokenselect.gpu.decoding_attention import count_attending
from vllm_tokenselect.gpu.graph_size import count_launches
from vllm_tokenselect.method.settings import Method

K = 1024
QWEN2, LLAMA, QWEN3 = SHAPES
GPU = Gpu()


def case(
    role: Role,
    context: int = 128 * K,
    batch: int = 1,
    queries: int = 1,
    captured: bool = True,
    shape=QWEN2,
    max_model_len: int = 1024 * K,
) -> Case:
    work = Work(shape, context, batch, queries)
    return Case(work, role, captured, max_model_len, method_of(role, Method()))


def test_the_model_knows_the_kernels_that_layers_launch_and_no_others():
    launched = set()
    for shape, role in itertools.product(SHAPES, ROLES):
        steps = [case(role, batch=n, captured=c, shape=shape) for n, c in ((1, False), (32, True))]
        if role in ("reselecting", "dense"):
            steps += [
                case(role, 32 * K, queries=n, captured=False, shape=shape) for n in (512, 8 * K)
            ]
        groups = [group for step in steps for group in record_layer(step, 132)]
        launched |= {launch.kernel for group in groups for launch in group.launches}
    assert launched <= set(PRICES)
    # A step with several rows of a request in the Selection Cache is none of these.
    assert set(PRICES) - launched == {"_decide", "_write_table", "_finish"}


def test_a_kernel_without_a_price_is_an_error():
    rows = record_layer(case("reusing"), 132)[0].rows
    with pytest.raises(UnknownKernel, match="_new"):
        cost_of(Launch("_new", (1,), {}), rows, GPU)


@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize("role", ROLES)
def test_the_launches_of_a_captured_step_are_those_that_are_counted_ahead(role, batch):
    step = case(role, 8 * K, batch=batch, shape=QWEN3)
    found = figures(step, GPU)
    assert found["groups"] == 1
    follows, attending = role == "following", partial(count_attending, step.limits, 128)
    with recording(int(GPU.multiprocessors)):
        ahead = count_launches(step.limits, batch, 1, attending, follows=follows)
    assert found["launches"] == ahead


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("role", ROLES)
def test_figures_are_the_sums_over_the_kernels(role, captured):
    step = case(role, batch=8, captured=captured)
    found = figures(step, GPU, kernels=True)
    kernels = found["kernels"].values()
    assert found["launches"] == sum(kernel["launches"] for kernel in kernels)
    total = sum(kernel["estimated_us"] for kernel in kernels)
    assert found["estimated_us"] == pytest.approx(total, abs=0.01)
    launched = [launch for group in record_layer(step, 132) for launch in group.launches]
    assert found["programs"] == sum(launch.programs for launch in launched)
    assert found["estimated_us"] > GPU.launch_us * len(launched)


def test_full_attention_reads_every_key_and_value_once():
    # 4 KV heads of 128 elements of two bytes; keys and values.
    found = figures(case("reselecting", 128 * K, batch=8), GPU)
    assert found["fa3_roofline_us"] == pytest.approx(
        8 * 128 * K * 4 * 128 * 2 * 2 / 4.3e6, abs=0.01
    )


def test_full_attention_of_a_prompt_computes_its_products():
    found = figures(case("reselecting", 128 * K, queries=8 * K, captured=False), GPU)
    seen = 8 * K * 120 * K + 8 * K * (8 * K + 1) / 2
    assert found["fa3_roofline_us"] == pytest.approx(4 * seen * 28 * 128 / 790e6, abs=0.01)


def test_a_prefill_step_reads_every_key_twice_and_keeps_no_scores():
    # 16 chunks of 512 share a tile; the last one has most candidates.
    step = case("reselecting", 1024 * K, queries=8 * K, captured=False)
    (group,) = record_layer(step, 132)
    keys = 2 * 4 * 128 * group.rows.candidates.max()
    costs = {launch.kernel: cost_of(launch, group.rows, GPU) for launch in group.launches}
    assert costs["score_tile"].hbm_bytes == costs["vote_tile"].hbm_bytes == keys
    assert "_soft_vote" not in costs


@pytest.mark.parametrize("role", ROLES)
def test_a_longer_context_never_costs_less(role):
    contexts = (4 * K, 8 * K, 32 * K, 128 * K, 1024 * K)
    times = [figures(case(role, context, batch=8), GPU)["estimated_us"] for context in contexts]
    assert times == sorted(times)


def test_what_does_not_read_the_context_costs_the_same_however_long_it_is():
    for role in ("reusing", "following"):
        short, long = (figures(case(role, context), GPU) for context in (8 * K, 1024 * K))
        for name in ("launches", "hbm_bytes", "estimated_us"):
            assert short[name] == long[name], name


def test_no_exact_selection_is_faster_than_its_floor():
    # All keys are read, and of the values next to nothing: half of what full attention reads.
    found = figures(case("reselecting", 1024 * K, batch=8), GPU)
    assert 0.5 < found["floor_us"] / found["fa3_roofline_us"] < 0.51
    assert found["floor_us"] < found["estimated_us"]
    assert found["hbm_bytes"] >= 1e6 * GPU.copy_tb_s * found["floor_us"]


def test_a_gpu_is_as_fast_as_its_slowest_part():
    gpu = Gpu(efficiency=1.0)
    reading = Cost(hbm_bytes=4.3e6)
    assert gpu.kernel_us(reading, 132) == pytest.approx(1.0)
    assert gpu.kernel_us(replace(reading, tensor_flops=790e6 * 3), 132) == pytest.approx(3.0)
    # 133 programs are two waves; a few programs cannot take the whole bandwidth.
    assert gpu.kernel_us(Cost(tensor_flops=790e6), 133) == pytest.approx(2 * 132 / 133)
    assert gpu.kernel_us(reading, 33) == pytest.approx(2.0)


def test_the_command_writes_and_prints_what_it_is(tmp_path, capsys):
    file = tmp_path / "cost.json"
    asked = ["--shapes", "Qwen2-7B", "--contexts", "8192", "--batches", "1", "--json", str(file)]
    assert main([*asked, "--markdown"]) == 0
    report = json.loads(file.read_text())
    assert "estimates" in report["kind"]
    layers = {(row["step"], row["layer"], row["captured"]) for row in report["results"]}
    assert len(layers) == 2 * len(ROLES) + 2
    printed = capsys.readouterr().out
    assert "ESTIMATED" in printed
    assert printed.count("| decode 1 |") == 2 * len(ROLES)

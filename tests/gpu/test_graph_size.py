"""CUDA graphs of decoding steps: counted ahead, bounded, and of the same result however they are cut."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from tests.gpu.flash_model import FlashAttentionModel
from tests.gpu.test_step import CONFIG, DEVICE, HEAD_SIZE, SCALE, Graph, Layer, ends_of
from vllm_tokenselect.gpu.flash_attention import PagedFlashAttention
from vllm_tokenselect.gpu.graph_size import (
    count_launches,
    fits_a_graph,
    largest_graph,
    num_passes,
    workspace_for,
)
from vllm_tokenselect.gpu.limits import GRAPH_PASSES, StepLimits
from vllm_tokenselect.gpu.step import GpuStep
from vllm_tokenselect.gpu.workspace import Workspace
from vllm_tokenselect.kernels.selection_cache.state import SelectionCacheState
from vllm_tokenselect.method.settings import Method

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="counts the interpreter's launches")
STEP = [(150 + i, 151 + i, 100) for i in range(6)]
GROUPS = 4 * 256 * (6 + 5)  # bytes: groups of five rows, passes of one


class Launches(TorchDispatchMode):
    """Counts what would launch a kernel: Triton's, and PyTorch's that write to a tensor."""

    def __init__(self, monkeypatch) -> None:
        super().__init__()
        self.count, self.inside = 0, False
        launch = interpreter.GridExecutor.__call__

        def counting(executor, *args, **kwargs):
            self.count += 1
            self.inside = True  # the interpreter's own work with tensors
            try:
                return launch(executor, *args, **kwargs)
            finally:
                self.inside = False

        monkeypatch.setattr(interpreter.GridExecutor, "__call__", counting)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returns = func._schema.returns
        is_view = returns and returns[0].alias_info and not returns[0].alias_info.is_write
        self.count += not (is_view or self.inside)
        return func(*args, **(kwargs or {}))


class Nothing:
    """Attends to nothing."""

    def parts(self, group):
        return (group,)

    def __call__(self, *arguments) -> None: ...


@pytest.mark.parametrize("workspace_bytes", [1 << 20, GROUPS], ids=["one pass", "several groups"])
@pytest.mark.parametrize("reuses", [False, True], ids=["selecting", "reusing"])
@pytest.mark.parametrize("follows", [False, True], ids=["anchor", "follower"])
def test_the_launches_of_a_captured_step_are_counted_ahead(
    workspace_bytes, reuses, follows, monkeypatch
):
    method = replace(CONFIG, anchor_layers=2, similarity_threshold=0.9 if reuses else 1)
    layer = Layer(STEP, (6, 2), workspace_bytes=workspace_bytes, method=method)
    layer.cache = replace(layer.cache, follows=follows)
    if reuses and not follows:
        state = SelectionCacheState.allocate(
            8, method.selection_size, 6, HEAD_SIZE, torch.float32, torch.device(DEVICE)
        )
        layer.cache = replace(layer.cache, selections=state)
    layer.attention = Nothing()
    graph = Graph(layer, num_tokens=6, queries=1)
    step, out = GpuStep(graph.captured, layer.block_table), torch.empty_like(layer.query)
    with Launches(monkeypatch) as launched:
        step.run_layer(layer.query, layer.cache, SCALE, layer.workspace, layer.attention, out)
    assert launched.count == count_launches(layer.limits, 6, 1, lambda rows: 0, follows=follows)
    assert launched.count == 0 if follows else launched.count > 3


def run_captured(workspace_bytes: int) -> torch.Tensor:
    layer = Layer(STEP, (6, 2), workspace_bytes=workspace_bytes)
    layer.attention = PagedFlashAttention(FlashAttentionModel(3))
    graph = Graph(layer, num_tokens=6, queries=1)
    assert (len(graph.captured) > 1) == (workspace_bytes == GROUPS)
    return graph.replay(STEP, ends_of(STEP))


def test_groups_and_passes_change_no_bit_of_what_is_attended():
    assert torch.equal(run_captured(GROUPS), run_captured(1 << 20))


@pytest.mark.parametrize(
    ("heads", "max_model_len", "fits"),
    [
        ((32, 8), 1 << 17, 256),
        ((32, 8), 1 << 20, 32),
        ((8, 1), 1 << 20, 96),
        ((64, 8), 1 << 15, 512),
    ],
    ids=["Llama-8B 128K", "Llama-8B 1M", "a rank of eight 1M", "Qwen3-32B 32K"],
)
def test_a_graph_of_long_contexts_is_a_few_dozen_kernels_a_layer(heads, max_model_len, fits):
    limits = StepLimits(Method(), *heads, max_model_len, 512 << 20, full_attention=True)
    assert fits_a_graph(limits, fits, 1)
    largest = largest_graph(limits, 512)
    assert not fits_a_graph(limits, largest + 1, 1) or largest == 512
    assert num_passes(limits, largest, 1) <= GRAPH_PASSES
    assert count_launches(limits, largest, 1, lambda rows: 3) <= 110


@pytest.mark.parametrize("num_tokens", [24, 100, 512])
def test_the_workspace_that_is_advised_is_enough(num_tokens):
    limits = StepLimits(Method(), 32, 8, 1 << 20, 512 << 20)
    enough = replace(limits, workspace_bytes=workspace_for(limits, num_tokens))
    assert fits_a_graph(enough, num_tokens, 1)


def test_a_workspace_cut_for_longer_contexts_serves_shorter_ones():
    # As after `--max-model-len -1`, which vLLM lowers when the layers have their buffers.
    layer = Layer(STEP, (6, 2))
    layer.attention = PagedFlashAttention(FlashAttentionModel(3))
    longer = replace(layer.limits, max_model_len=20 * 256, full_attention=True)
    layer.workspace = Workspace(longer, HEAD_SIZE, torch.device(DEVICE))
    layer.limits = replace(layer.limits, full_attention=True)
    out = Graph(layer, num_tokens=6, queries=1).replay(STEP)
    torch.testing.assert_close(out, layer.expected(STEP), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("full_attention", [False, True])
def test_every_shorter_context_fits_a_workspace(full_attention):
    longest = StepLimits(Method(), 8, 8, 1 << 20, 512 << 20, full_attention=full_attention)
    most_parts = longest.group_parts(4096)
    for length in (1 << 12, 80_000, 1 << 18, (1 << 20) - 1):
        shorter = replace(longest, max_model_len=length)
        assert shorter.table_rows * shorter.table_width <= longest.table_entries
        rows, width = shorter.group_rows(shorter.max_width), shorter.max_width
        lines = rows + shorter.num_heads * shorter.pass_rows(rows, width)
        assert 4 * width * lines <= longest.score_bytes
        for width in range(64, shorter.max_width + 1, 4096):  # of one part, of two, ...
            assert shorter.group_rows(width) * -(-width // 4096) <= most_parts

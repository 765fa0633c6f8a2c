"""CUDA graphs of decoding steps: counted ahead, bounded, and of the same result however they are cut."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from tests.gpu.flash_model import FlashAttentionModel
from tests.gpu.test_step import (
    CONFIG,
    DEVICE,
    HEAD_SIZE,
    SCALE,
    Graph,
    Layer,
    ends_of,
    groups_of_rows,
)
from vllm_tokenselect.gpu.flash_attention import PagedFlashAttention
from vllm_tokenselect.gpu.graph_size import (
    count_launches,
    fits_a_graph,
    largest_graph,
    num_groups,
    workspace_for,
)
from vllm_tokenselect.gpu.limits import GRAPH_GROUPS, MAX_GROUP_ROWS, StepLimits
from vllm_tokenselect.gpu.step import GpuStep
from vllm_tokenselect.gpu.workspace import Workspace
from vllm_tokenselect.kernels.selection_cache.state import SelectionCacheState
from vllm_tokenselect.method.settings import Method

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="counts the interpreter's launches")
STEP = [(150 + i, 151 + i, 100) for i in range(6)]


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


@pytest.mark.parametrize("rows", [512, 4], ids=["one group", "several groups"])
@pytest.mark.parametrize("reuses", [False, True], ids=["selecting", "reusing"])
@pytest.mark.parametrize("follows", [False, True], ids=["anchor", "follower"])
def test_the_launches_of_a_captured_step_are_counted_ahead(rows, reuses, follows, monkeypatch):
    method = replace(CONFIG, anchor_layers=2, similarity_threshold=0.9 if reuses else 1)
    layer = Layer(STEP, (6, 2), method=method)
    groups_of_rows(monkeypatch, layer.limits, rows)
    layer.cache = replace(layer.cache, follows=follows)
    if reuses and not follows:
        state = SelectionCacheState.allocate(
            8, method.selection_size, 6, HEAD_SIZE, torch.float32, torch.device(DEVICE)
        )
        layer.cache = replace(layer.cache, selections=state)
    layer.attention = Nothing()
    graph = Graph(layer, num_tokens=6, queries=1)
    assert len(graph.captured) == -(-6 // rows)
    step, out = GpuStep(graph.captured, layer.block_table), torch.empty_like(layer.query)
    with Launches(monkeypatch) as launched:
        step.run_layer(layer.query, layer.cache, SCALE, layer.workspace, layer.attention, out)
    assert launched.count == count_launches(layer.limits, 6, 1, lambda rows: 0, follows=follows)
    assert launched.count == 0 if follows else launched.count > 3


def test_groups_change_no_bit_of_what_is_attended(monkeypatch):
    layer = Layer(STEP, (6, 2))
    layer.attention = PagedFlashAttention(FlashAttentionModel(3))
    found = []
    for rows, groups in ((512, 1), (4, 2)):
        groups_of_rows(monkeypatch, layer.limits, rows)
        graph = Graph(layer, num_tokens=6, queries=1)
        assert len(graph.captured) == groups
        found.append(graph.replay(STEP, ends_of(STEP)))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("heads", "max_model_len", "tokens", "groups"),
    [
        ((32, 8), 1 << 17, 256, 1),
        ((28, 4), 1 << 20, 32, 1),
        ((64, 8), 1 << 20, 32, 1),
        ((8, 1), 1 << 20, 96, 3),
        ((64, 8), 1 << 15, 512, 1),
    ],
    ids=["Llama-8B 128K", "Qwen2-7B 1M", "Qwen3-32B 1M", "a rank of eight 1M", "Qwen3-32B 32K"],
)
def test_a_graph_of_long_contexts_has_few_groups(heads, max_model_len, tokens, groups):
    limits = StepLimits(Method(), *heads, max_model_len, 512 << 20, full_attention=True)
    assert fits_a_graph(limits, tokens, 1)
    assert num_groups(limits, tokens, 1) == groups
    assert count_launches(limits, tokens, 1, lambda rows: 1) == groups * 5


def test_a_graph_of_too_many_groups_or_with_too_little_workspace_does_not_pay():
    limits = StepLimits(Method(), 32, 8, 1 << 23, 2 << 30, full_attention=True)
    largest = largest_graph(limits, 512)
    assert num_groups(limits, largest, 1) == GRAPH_GROUPS
    assert not fits_a_graph(limits, largest + 1, 1)
    assert not fits_a_graph(limits, largest, 3), "the rows of a request do not fit"


@pytest.mark.parametrize("contexts", [1, 4, 9])
def test_the_workspace_that_is_advised_is_enough(contexts):
    limits = StepLimits(Method(), 32, 8, 1 << 20, 192 << 20)
    enough = replace(limits, workspace_bytes=workspace_for(limits, contexts))
    assert enough.score_columns >= contexts * enough.max_width
    assert fits_a_graph(enough, contexts, contexts)


def test_contexts_that_do_not_fit_at_once_are_refused_by_name():
    layer = Layer(STEP, (6, 2), workspace_bytes=4 * 256 * 7)  # of one row
    with pytest.raises(RuntimeError, match=r"\d+ candidates in 6 rows, .* the scores of \d+; "):
        Graph(layer, num_tokens=6, queries=1).write(STEP, ends_of(STEP))


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
    for length in (1 << 12, 80_000, 1 << 18, (1 << 20) - 1):
        shorter = replace(longest, max_model_len=length)
        assert shorter.table_rows * shorter.table_width <= longest.table_entries
        columns = (shorter.num_heads + 1) * shorter.score_columns
        assert 4 * max(columns, shorter.vote_columns) <= longest.score_bytes
        assert shorter.vote_columns <= longest.vote_columns
        assert shorter.max_width <= shorter.score_columns <= MAX_GROUP_ROWS * shorter.max_width


@pytest.mark.parametrize("megabytes", [56, 100, 512, 2000])
def test_a_workspace_is_filled_with_votes_and_scores_or_with_votes_alone(megabytes):
    limits = StepLimits(Method(), 12, 4, 1 << 20, megabytes << 20)
    assert limits.score_columns >= limits.max_width
    for columns in (limits.vote_columns, (limits.num_heads + 1) * limits.score_columns):
        assert 0.9 * limits.workspace_bytes < 4 * columns <= limits.workspace_bytes

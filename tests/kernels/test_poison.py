"""What a request does not attend to is not multiplied: it may be NaN or infinite, and no bit changes."""

import pytest
import torch

from tests.kernels.cases import (
    SHAPES,
    Case,
    make_group,
    make_rotation,
    paged_cache,
    run_group,
)
from vllm_tokenselect.kernels.gather.cpu import gather_tokens
from vllm_tokenselect.kernels.layer_cache import LayerCache
from vllm_tokenselect.kernels.score.cpu import score_paged_keys
from vllm_tokenselect.kernels.selection_cache.state import SelectionCacheState
from vllm_tokenselect.kernels.vote.cpu import soft_vote
from vllm_tokenselect.method.settings import Method

N_INIT, TOP_K = 5, 20
METHOD = Method(n_init=N_INIT, top_k=TOP_K, similarity_threshold=0.9, refresh_interval=4)
POISON = [float("nan"), float("inf"), float("-inf")]
# One of each dtype, with heads and blocks that fill no vector and no tile.
CASES = [SHAPES[5], SHAPES[7], SHAPES[8]]


class Request:
    """Row 0 of a case alone, with what its kernels give."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.kv_cache, block_table = paged_cache(case)
        self.block_table = block_table[:1].contiguous()
        generator = torch.Generator().manual_seed(0)
        shape = (1, case.num_heads, case.head_size)
        self.query = torch.randn(shape, generator=generator).to(case.torch_dtype)
        self.end = torch.tensor([case.tokens - 4], dtype=torch.int32)

    def own_slots(self) -> torch.Tensor:
        """Slots of the tokens in the context; all others are somebody else's, or nobody's yet."""
        size = self.case.block_size
        positions = torch.arange(int(self.end) + 1)
        return self.block_table[0, positions // size] * size + positions % size

    def poison_the_rest(self, number: float) -> None:
        foreign = torch.ones(self.kv_cache.shape[0] * self.case.block_size, dtype=torch.bool)
        foreign[self.own_slots().long()] = False
        tokens = self.kv_cache.permute(0, 3, 1, 2, 4)  # [num_blocks, block_size, Hkv, 2, D]
        tokens[foreign.view(-1, self.case.block_size)] = number

    def outputs(self, state: SelectionCacheState | None = None) -> list[torch.Tensor]:
        case, found = self.case, []
        row = torch.zeros(1, dtype=torch.int32)
        scoring = (self.kv_cache, self.block_table, row, N_INIT, self.end, 0.2)
        logits = score_paged_keys(self.query.float(), *scoring)
        found += [logits.clone(), soft_vote(logits)]
        slots = self.own_slots().int()
        gathered = torch.empty((2, len(slots), case.num_kv_heads, case.head_size))
        gathered = gathered.to(case.torch_dtype)
        rotation = make_rotation(case)
        gather_tokens(self.kv_cache, slots, *gathered, rotation.cos_sin)
        found.append(gathered)
        top_k = torch.tensor([TOP_K], dtype=torch.int32)
        cache = LayerCache(self.kv_cache, selections=state, rotation=rotation)
        for selects in (False, True):
            lengths = torch.tensor([len(slots)], dtype=torch.int32)
            caches = torch.tensor([selects and state is not None])
            table = (slots[None].clone(), lengths)
            group = make_group(row, row, top_k, self.end, *table, selects, caches, row, row + 7)
            out = torch.empty_like(self.query)
            run_group(group, self.query, cache, self.block_table, METHOD, out)
            found.append(out)
        return found


def assert_same_bits(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert not one.isnan().any()
        assert torch.equal(one, other)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("number", POISON, ids=str)
def test_what_lies_in_other_slots_reaches_no_request(case: Case, number: float):
    request = Request(case)
    clean = request.outputs()
    request.poison_the_rest(number)
    assert_same_bits(request.outputs(), clean)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_request_of_nan_leaves_nothing_in_the_kernels_own_buffers(case: Case):
    request, poisoned = Request(case), Request(case)
    clean = request.outputs()
    poisoned.kv_cache[:] = float("nan")
    poisoned.query[:] = float("nan")
    for _ in range(3):  # memory that is freed comes back sooner or later
        poisoned.outputs()
        assert_same_bits(request.outputs(), clean)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_line_of_the_selection_cache_that_another_request_left_is_not_compared(case: Case):
    request = Request(case)
    shape = (case.num_heads, case.head_size, case.torch_dtype, torch.device("cpu"))
    state = SelectionCacheState.allocate(1, N_INIT + TOP_K, *shape)
    clean = request.outputs(state)
    state.query.fill_(float("nan"))
    state.selected.fill_(-1)
    state.candidate_end.copy_(request.end)
    state.owner.fill_(3)
    assert_same_bits(request.outputs(state), clean)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nan_of_a_request_stays_nan_and_its_neighbor_in_the_step_keeps_its_bits(case: Case):
    """Rows are computed together, one whose keys or values are NaN beside one whose are not."""
    kv_cache, block_table = paged_cache(case)
    block_table[1, 0] = block_table[1, -1]  # nothing shared
    query = torch.randn(2, case.num_heads, case.head_size).to(case.torch_dtype)
    index, end = torch.arange(2, dtype=torch.int32), torch.full((2,), case.tokens - 4)
    end, top_k = end.int(), torch.full((2,), TOP_K, dtype=torch.int32)

    def attend() -> torch.Tensor:
        slots = torch.empty((2, case.tokens), dtype=torch.int32)
        group = make_group(index, index, top_k, end, slots, torch.empty_like(end))
        out = torch.empty_like(query)
        run_group(group, query, LayerCache(kv_cache), block_table, METHOD, out)
        return out

    clean = attend()
    for part in (0, 1):  # keys, values
        kept = kv_cache.clone()
        kv_cache[block_table[0].long(), :, part] = float("nan")
        spoiled = attend()
        assert spoiled[0].isnan().all()
        assert torch.equal(spoiled[1], clean[1])
        kv_cache.copy_(kept)

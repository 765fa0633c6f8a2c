"""The own attention is that of the definition, and a row's result depends on nothing but the row."""

from dataclasses import replace

import pytest
import torch

from tests.kernels.cases import SOFTMAX, Case, make_rotation, make_softmax
from tests.kernels_gpu.cases import DEVICE, DTYPES, SHAPES, device_cache, int32
from vllm_tokenselect.kernels.attend import gpu, reference
from vllm_tokenselect.kernels.attend.gpu import MAX_SPLITS, SPLIT_TOKENS, AttendScratch, attend_rows
from vllm_tokenselect.kernels.gpu_launch import INTERPRETED
from vllm_tokenselect.kernels.rotate.reference import rotate

TOLERANCE = {"fp32": 2e-5, "fp16": 2e-3, "bf16": 1e-2, "fp8": 2e-3}
SMALL = Case(1, 300, 6, 2, 32, 16, "fp32")
WIDTH = 330


class Rows:
    """A step's rows of one query each: random slots of a random cache."""

    def __init__(self, case: Case, lengths: list[int], layout: str = "tokens", query_dtype=None):
        torch.manual_seed(0)
        self.kv_cache, _ = device_cache(case, layout)
        quantized = case.dtype == "fp8"
        dtype = query_dtype or (torch.float16 if quantized else self.kv_cache.dtype)
        shape = (len(lengths), case.num_heads, case.head_size)
        self.query = torch.randn(shape, device=DEVICE).to(dtype)
        self.lengths = int32(*lengths)
        num_slots, width = len(self.kv_cache) * case.block_size, max(*lengths, 1)
        self.slots = torch.randint(num_slots, (len(lengths), width), device=DEVICE).int()
        self.scales = [torch.tensor([s], device=DEVICE) if quantized else None for s in (0.5, 1.5)]
        self.starts = torch.arange(len(lengths) + 1, device=DEVICE).int()
        self.max_query_len, self.max_length = 1, width

    def scratch(self, max_queries: int = 512) -> AttendScratch:
        """With numbers in it that no result may see."""
        heads = self.query.shape[1], self.kv_cache.shape[1]
        scratch = AttendScratch(
            max_queries, self.max_length, *heads, self.query.shape[2], torch.device(DEVICE)
        )
        for left in (scratch.weighted, scratch.maxima, scratch.totals):
            left.fill_(float("nan"))
        return scratch

    def attend(self, scratch: AttendScratch | None = None, cos_sin=None, **softmax) -> torch.Tensor:
        """Outputs; 9 where nothing was written."""
        scratch, out = scratch or self.scratch(), torch.full_like(self.query, 9.0)
        attend_rows(
            self.query,
            self.starts,
            self.max_query_len,
            self.kv_cache,
            self.slots,
            self.lengths,
            self.max_length,
            0.3,
            scratch,
            out,
            cos_sin,
            *self.scales,
            **softmax,
        )
        assert not scratch.tickets.any(), "a replayed graph finds them as they are"
        return out

    def expected(self, cos_sin=None, **softmax) -> torch.Tensor:
        kv_cache = self.kv_cache.float()
        for kind, scale in enumerate(self.scales):
            if scale is not None:
                kv_cache[:, :, kind] *= scale
        out = torch.full(self.query.shape, 9.0, device=DEVICE)
        reference.attend(
            self.query.float(),
            self.starts,
            kv_cache,
            self.slots,
            self.lengths,
            0.3,
            out,
            cos_sin,
            **softmax,
        )
        return out

    def expected_rounded(self, cos_sin: torch.Tensor) -> torch.Tensor:
        """As `expected`, with rotated queries and keys rounded to the dtype of products."""
        out = torch.full(self.query.shape, 9.0, device=DEVICE)
        block_size = self.kv_cache.shape[3]
        for row, length in enumerate(self.lengths.tolist()):
            index = self.slots[row, :length].long()
            tokens = self.kv_cache.float()[index // block_size, :, :, index % block_size]
            keys, values = tokens.unbind(dim=2)  # [m, Hkv, D]
            keys = rotate(keys.to(self.query.dtype), cos_sin[:length]).float()
            query = rotate(self.query[row : row + 1], cos_sin[length - 1 : length])
            for part, scale in zip((keys, values), self.scales, strict=True):
                part *= 1.0 if scale is None else scale
            reference.attend(
                query.float(),
                self.starts[:2],
                torch.stack([keys, values], dim=2)[:, :, :, None],
                torch.arange(length, device=DEVICE).int()[None],
                int32(length),
                0.3,
                out[row : row + 1],
            )
        return out


def assert_close(actual: torch.Tensor, expected: torch.Tensor, case: Case) -> None:
    tolerance = TOLERANCE[case.dtype]
    torch.testing.assert_close(actual.float(), expected, rtol=tolerance, atol=tolerance)


def assert_defined(rows: Rows, case: Case, **arguments) -> None:
    assert_close(rows.attend(**arguments), rows.expected(**arguments), case)


@pytest.mark.parametrize("layout", ["tokens", "heads"])
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_attention_is_that_of_the_definition(case: Case, layout: str):
    assert_defined(Rows(case, [45, 0, 261], layout), case)


@pytest.mark.parametrize("share", [1.0, 0.4], ids=["whole", "a part"])
@pytest.mark.parametrize("case", SHAPES[:4] + SHAPES[5:6], ids=str)
def test_tokens_are_rotated_in_their_order_and_the_query_as_the_last(case: Case, share: float):
    cos_sin = make_rotation(case, share, WIDTH).cos_sin.to(DEVICE)
    rows = Rows(case, [2, 1, 150])
    # The interpreter multiplies in fp32.
    expected = rows.expected(cos_sin) if INTERPRETED else rows.expected_rounded(cos_sin)
    assert_close(rows.attend(cos_sin=cos_sin), expected, case)


@pytest.mark.parametrize("name", SOFTMAX)
@pytest.mark.parametrize("case", SHAPES[:2] + SHAPES[5:6], ids=str)
def test_sinks_and_caps_are_those_of_the_definition(case: Case, name: str):
    softmax = make_softmax(case, name)
    if softmax["sinks"] is not None:
        softmax["sinks"] = softmax["sinks"].to(DEVICE).to(torch.bfloat16)
    rows = Rows(case, [200, 0, 3])
    assert_defined(rows, case, **softmax)
    assert (rows.expected(**softmax) - rows.expected()).abs().max() > 0.05, "they should matter"


def test_a_sink_far_above_or_below_all_scores_takes_all_or_nothing():
    rows = Rows(SMALL, [300, 20, 1])
    sinks = torch.full((6,), 200.0, device=DEVICE)
    assert rows.attend(sinks=sinks).abs().max() < 1e-30
    for least in (-200.0, float("-inf")):  # vLLM pads heads with the latter
        out = rows.attend(sinks=torch.full_like(sinks, least))
        torch.testing.assert_close(out, rows.attend(), rtol=2e-5, atol=2e-5)


def test_a_cap_is_exact_for_scores_far_below_and_far_above_it():
    rows = Rows(SMALL, [140, 140, 140])
    rows.query *= torch.tensor([1e-3, 1.0, 100.0], device=DEVICE)[:, None, None]
    assert_defined(rows, SMALL, soft_cap=30.0)


def test_splits_are_joined_at_every_boundary():
    most = SPLIT_TOKENS * MAX_SPLITS
    lengths = [0, 1, 63, 64, 65, 127, 128, 129, 255, 257, most, most + 1]
    case = replace(SMALL, tokens=100, num_heads=1, num_kv_heads=1, head_size=16)
    assert_defined(Rows(case, lengths), case)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8, 17])
def test_any_number_of_heads_shares_a_kv_head(group: int):
    case = replace(SMALL, num_heads=2 * group)
    assert_defined(Rows(case, [130]), case)


@pytest.mark.parametrize("query_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != "fp32"])
def test_queries_need_not_have_the_caches_dtype(dtype: str, query_dtype):
    case = replace(SMALL, dtype=dtype)
    rows = Rows(case, [70], query_dtype=query_dtype)
    actual = rows.attend().float()
    torch.testing.assert_close(actual, rows.expected(), rtol=1e-2, atol=1e-2)


def test_large_scores_neither_overflow_nor_vanish():
    rows = Rows(SMALL, [290, 30])
    rows.query *= 300
    torch.testing.assert_close(rows.attend(), rows.expected(), rtol=1e-2, atol=1e-2)


def test_queries_lie_anywhere_in_a_slice_of_the_projection():
    rows = Rows(SMALL, [40, 150])
    expected = rows.attend()
    projected = torch.randn(2, 12, 32, device=DEVICE)
    projected[:, 3:9] = rows.query
    rows.query = projected[:, 3:9]
    assert torch.equal(rows.attend(), expected)


def test_queries_of_a_row_see_one_token_more_each():
    """As with drafts: a padded request has no query, and queries of no row are left alone."""
    rows = Rows(SMALL, [40, 3, 150, 131, 0])
    rows.query = torch.randn(11, 6, 32, device=DEVICE)
    rows.starts, rows.max_query_len = int32(1, 2, 5, 6, 9, 9), 3
    assert_defined(rows, SMALL)
    cos_sin = make_rotation(SMALL, 0.5, WIDTH).cos_sin.to(DEVICE)
    assert_defined(rows, SMALL, cos_sin=cos_sin)


def test_many_rows_of_several_queries_are_told_apart(monkeypatch):
    monkeypatch.setattr(gpu, "ROWS_PER_STEP", 4)
    lens = [1, 2, 1, 3, 1, 1, 2, 0, 0]
    rows = Rows(SMALL, [9 + 5 * i for i in range(len(lens))])
    rows.starts = torch.tensor([0, *lens], device=DEVICE).cumsum(0).int()
    rows.query, rows.max_query_len = torch.randn(sum(lens), 6, 32, device=DEVICE), 3
    assert_defined(rows, SMALL)


def test_a_rows_output_is_the_same_bits_alone_and_in_any_company():
    rows = Rows(replace(SMALL, num_heads=3, num_kv_heads=1), [300, 7, 129, 0, 64])
    cos_sin = make_rotation(SMALL, 1.0, WIDTH).cos_sin.to(DEVICE)
    expected = rows.attend(cos_sin=cos_sin)
    # In several launches, and where rows could be longer than they are.
    rows.max_length = 5 * SPLIT_TOKENS
    assert torch.equal(rows.attend(rows.scratch(2), cos_sin), expected)
    query, slots, lengths = rows.query, rows.slots, rows.lengths
    for order in ([4, 2, 3, 0, 1], [2]):
        rows.query, rows.slots, rows.lengths = query[order], slots[order], lengths[order]
        rows.starts = torch.arange(len(order) + 1, device=DEVICE).int()
        assert torch.equal(rows.attend(cos_sin=cos_sin), expected[order])


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "fp8"])
def test_nothing_but_a_rows_own_tokens_is_seen(dtype: str, rotated: bool):
    case = replace(SMALL, dtype=dtype)
    rows = Rows(case, [150, 0, 33, 64])
    cos_sin = make_rotation(SMALL, 0.5, WIDTH).cos_sin.to(DEVICE) if rotated else None
    block = len(rows.kv_cache) - 1
    rows.slots %= block * case.block_size  # the last block is nobody's
    expected = rows.attend(cos_sin=cos_sin)
    assert expected.isfinite().all()
    poison = torch.tensor([float("nan"), float("inf")], device=DEVICE)
    rows.kv_cache[block] = poison.repeat(case.head_size // 2).to(rows.kv_cache.dtype)
    for row, length in enumerate(rows.lengths.tolist()):
        rows.slots[row, length:] = block * case.block_size
    if cos_sin is not None:
        cos_sin[150:] = float("nan")
    assert torch.equal(rows.attend(cos_sin=cos_sin), expected)
    rows.query[0] = float("nan")
    out = rows.attend(cos_sin=cos_sin)
    assert out[0].isnan().all()
    assert torch.equal(out[1:], expected[1:])

"""Queries + sparse block table -> output on a GPU, by libraries.

Every selected token precedes its row's own queries, so gathering a row's tokens in order of position
and attending with a causal mask aligned to the lower right is exact. FlashAttention 3 reads the cache
through the sparse block table itself (`flash_attention.py`); what stands here gathers first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F

from vllm_tokenselect.device_memory import make_lasting
from vllm_tokenselect.gpu.rows import RowGroup
from vllm_tokenselect.kernels.gather.gpu import gather_rows
from vllm_tokenselect.kernels.layer_cache import LayerCache

# Keys and values of the rows that are gathered together; at least one row's.
GATHER_BYTES = 256 << 20
# Lines of the gathered buffer are whole pages: FlashAttention 4 reads pages of 128 tokens best.
PAGE_TOKENS = 128
# How vLLM's names of quantized caches are to be read; it hands them over as bytes.
FP8_DTYPES = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


class RowAttention(Protocol):
    """Attention over the sparse block table.

    Whatever lies behind a row's tokens, in a buffer or in the cache, is not seen in its outputs.

    Attributes:
        name: as the setting `attention` names it.
        buffer_bytes: what it holds.
        scratch_bytes: bound of what the library allocates by itself in a call.
    """

    name: str
    buffer_bytes: int
    scratch_bytes: int

    def takes(self, pages: torch.Tensor) -> bool:
        """Whether it can read the pages of a cache where they lie."""

    def __call__(
        self,
        query: torch.Tensor,
        cache: LayerCache,
        group: RowGroup,
        slots: torch.Tensor,
        lengths: torch.Tensor,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        """Attend the rows of a group.

        Args:
            query: [T, Hq, D], queries of the group, rotated; those of the rows are read.
            cache: the layer's. Its keys are rotated here if they lie there un-rotated.
            group: its rows.
            slots: int32 [R, width], sparse block table of page size 1, ascending by position.
            lengths: int32 [R], entries of each row; 0 for a padded row.
            scale: scale of q . k.
            out: [T, Hq, D]; written for the rows' queries, of others what the library leaves there.
        """


class GatherBuffer:
    """Contiguous keys and values of a few rows, a line of whole pages for each.

    Args:
        num_kv_heads, head_size: of a layer.
        dtype: of the queries; a quantized cache is widened to it.
        width: most tokens of a row.
        device: where the buffer lies.

    Attributes:
        keys, values: [lines, width, Hkv, D], `width` rounded up to whole pages.
    """

    def __init__(
        self,
        num_kv_heads: int,
        head_size: int,
        dtype: torch.dtype,
        width: int,
        device: torch.device,
    ) -> None:
        width = -(-width // PAGE_TOKENS) * PAGE_TOKENS
        line_bytes = 2 * width * num_kv_heads * head_size * dtype.itemsize
        lines = max(GATHER_BYTES // line_bytes, 1)
        shape = (2, lines, width, num_kv_heads, head_size)
        self.keys, self.values = torch.empty(shape, dtype=dtype, device=device)

    @property
    def num_lines(self) -> int:
        return len(self.keys)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.keys, self.values))

    def gather(
        self,
        cache: LayerCache,
        slots: torch.Tensor,
        lengths: torch.Tensor,
        zeroed: int | None = None,
    ) -> Iterator[tuple[int, int]]:
        """Gather rows, as many at a time as there are lines; yields their first and last.

        Args:
            zeroed: as `gather_rows` takes it; whole lines when None.
        """
        cos_sin = cache.rotation.cos_sin if cache.rotation is not None else None
        for first in range(0, len(slots), self.num_lines):
            last = min(first + self.num_lines, len(slots))
            gather_rows(
                cache.pages,
                slots[first:last],
                lengths[first:last],
                self.keys[: last - first],
                self.values[: last - first],
                cos_sin=cos_sin,
                key_scale=cache.key_scale,
                value_scale=cache.value_scale,
                zeroed=zeroed or self.keys.shape[1],
            )
            yield first, last


class SdpaAttention:
    """PyTorch's scaled_dot_product_attention; needs torch only. It has neither sinks nor soft caps.

    A CUDA graph may capture rows of one query; how long others are it asks the host. Of its kernels only
    the one that writes every logit down lets heads share keys, and it copies the keys for each of them:
    heads are handed over in another dimension's place.

    Args:
        buffer: scratch, shared by layers.
    """

    name = "sdpa"
    scratch_bytes = 0

    def __init__(self, buffer: GatherBuffer) -> None:
        self.buffer = buffer
        self.buffer_bytes = buffer.num_bytes
        width, device = buffer.keys.shape[1], buffer.keys.device
        self.position = make_lasting(lambda: torch.arange(width, device=device))

    def takes(self, pages: torch.Tensor) -> bool:
        return True

    def __call__(
        self,
        query: torch.Tensor,
        cache: LayerCache,
        group: RowGroup,
        slots: torch.Tensor,
        lengths: torch.Tensor,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        for first, last in self.buffer.gather(cache, slots, lengths):
            if group.max_query_len == 1:
                self._attend_single_queries(query, lengths, first, last, scale, out)
                continue
            for row in range(first, last):
                if group.query_lens[row]:
                    self._attend_row(query, group, lengths, row, row - first, scale, out)

    def _attend_single_queries(
        self,
        query: torch.Tensor,
        lengths: torch.Tensor,
        first: int,
        last: int,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        """Rows of one query each: row `r` is query `r` of the group."""
        queries = slice(first, last)
        # A padded row sees a zero: nothing at all would be a NaN.
        visible = self.position < lengths[first:last, None].clamp(min=1)  # [rows, width]
        # Heads that share keys take the place of queries: [rows, Hkv, group, D].
        num_kv_heads, head_size = self.buffer.keys.shape[2:]
        grouped = query[queries].reshape(last - first, num_kv_heads, -1, head_size)
        attended = F.scaled_dot_product_attention(
            grouped,
            self.buffer.keys[: last - first].transpose(1, 2),
            self.buffer.values[: last - first].transpose(1, 2),
            attn_mask=visible[:, None, None],
            scale=scale,
        )
        out[queries] = attended.flatten(1, 2)

    def _attend_row(
        self,
        query: torch.Tensor,
        group: RowGroup,
        lengths: torch.Tensor,
        row: int,
        line: int,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        start, num_queries = int(group.query_starts[row]), int(group.query_lens[row])
        queries = slice(start, start + num_queries)
        # The last query sees all tokens of the row, the one before it all but the last.
        last_visible = lengths[row] - num_queries + self.position[:num_queries, None]
        # Heads that share keys take the place of requests: [group, Hkv, queries, D].
        num_kv_heads, head_size = self.buffer.keys.shape[2:]
        grouped = (
            query[queries].reshape(num_queries, num_kv_heads, -1, head_size).permute(2, 1, 0, 3)
        )
        keys, values = (
            tensor[line].transpose(0, 1).expand(len(grouped), -1, -1, -1)
            for tensor in (self.buffer.keys, self.buffer.values)
        )
        attended = F.scaled_dot_product_attention(
            grouped, keys, values, attn_mask=self.position <= last_visible, scale=scale
        )
        out[queries] = attended.permute(2, 1, 0, 3).flatten(1, 2)

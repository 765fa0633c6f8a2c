"""Queries + sparse block table -> output on a GPU.

Every selected token precedes its row's own queries, so gathering a row's tokens in order of position
and attending with a causal mask aligned to the lower right is exact. FlashAttention 3 reads the cache
through the sparse block table itself (`flash_attention.py`); all others gather first. Rows of few queries
go to a kernel of our own, which reads through the table too (`decoding_attention.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch

from vllm_tokenselect.gpu.rows import RowGroup
from vllm_tokenselect.kernels.block_table.table import SparseBlockTable
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
        in_place: whether it reads the cache through the table, and so takes pages of some layouts only.
        buffer_bytes: size of its buffers.
        scratch_bytes: bound of what the library allocates by itself in a call.
    """

    name: str
    in_place: bool
    buffer_bytes: int
    scratch_bytes: int

    def takes(self, pages: torch.Tensor) -> bool:
        """Whether it can read the pages of a cache where they lie."""

    def parts(self, group: RowGroup) -> Sequence[RowGroup]:
        """The group, or parts of its rows that are attended apart."""

    def rotates(self, group: RowGroup) -> bool:
        """Whether it is handed the group's queries as they come, and rotates them as the layer asks."""

    def __call__(
        self,
        query: torch.Tensor,
        cache: LayerCache,
        group: RowGroup,
        table: SparseBlockTable,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        """Attend the rows of a group, or of a part of one.

        Args:
            query: [T, Hq, D], queries of the group, rotated where this does not rotate them; those of its
                rows are read.
            cache: the layer's. Keys that it holds un-rotated are rotated here.
            group: its rows.
            table: of the group.
            scale: scale of q . k.
            out: [T, Hq, D], written for the rows' queries. The library may overwrite others.
        """


class GatheredRows(NamedTuple):
    """Rows of a group whose tokens have been gathered.

    Attributes:
        first, last: the rows, counted from the group's first.
        keys, values: [rows, width, Hkv, D], a line for each row.
        lengths: int32 [rows], tokens in each line.
    """

    first: int
    last: int
    keys: torch.Tensor
    values: torch.Tensor
    lengths: torch.Tensor


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
        return int(self.keys.nbytes + self.values.nbytes)

    def gather(
        self, cache: LayerCache, table: SparseBlockTable, zeroed: int | None = None
    ) -> Iterator[GatheredRows]:
        """Gather rows, as many at a time as there are lines.

        Args:
            zeroed: as `gather_rows` takes it; whole lines when None.
        """
        num_rows = len(table.slots)
        for first in range(0, num_rows, self.num_lines):
            last = min(first + self.num_lines, num_rows)
            keys, values = self.keys[: last - first], self.values[: last - first]
            lengths = table.lengths[first:last]
            gather_rows(
                cache.pages,
                table.slots[first:last],
                lengths,
                keys,
                values,
                cos_sin=cache.rotation.cos_sin if cache.rotation is not None else None,
                key_scale=cache.key_scale,
                value_scale=cache.value_scale,
                zeroed=zeroed or keys.shape[1],
            )
            yield GatheredRows(first, last, keys, values, lengths)


class GatheringAttention(ABC):
    """A library that attends over gathered tokens, of any cache.

    Args:
        buffer: scratch, shared by layers.

    Attributes:
        zeroed: as `GatherBuffer.gather` takes it: how far behind a row the library multiplies.
    """

    name: str
    in_place = False
    scratch_bytes = 0
    zeroed: int | None = None

    def __init__(self, buffer: GatherBuffer) -> None:
        self.buffer = buffer
        self.buffer_bytes = buffer.num_bytes

    def takes(self, pages: torch.Tensor) -> bool:
        return True

    def parts(self, group: RowGroup) -> Sequence[RowGroup]:
        return (group,)

    def rotates(self, group: RowGroup) -> bool:
        return False

    def __call__(
        self,
        query: torch.Tensor,
        cache: LayerCache,
        group: RowGroup,
        table: SparseBlockTable,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        for rows in self.buffer.gather(cache, table, self.zeroed):
            self.attend(query, cache.sinks, group, rows, scale, out)

    @abstractmethod
    def attend(
        self,
        query: torch.Tensor,
        sinks: torch.Tensor | None,
        group: RowGroup,
        rows: GatheredRows,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        """Attend the gathered rows of a group; `sinks` are those of `LayerCache`."""

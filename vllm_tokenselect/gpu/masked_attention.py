"""Attention over gathered tokens with PyTorch's own operations and a mask; needs torch only.

A CUDA graph may capture rows of one query; how long others are it asks the host.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F

from vllm_tokenselect.device_memory import make_lasting
from vllm_tokenselect.gpu.attention import GatherBuffer, GatheredRows, GatheringAttention
from vllm_tokenselect.gpu.rows import RowGroup


class MaskedQueries(NamedTuple):
    """Queries, what they are attended to, and how much of it each sees.

    Attributes:
        query: [n, Hq, D].
        keys, values: [n, width, Hkv, D], a line for each query, or [width, Hkv, D], one line for all.
        ends: int [n, 1], one past the last token that each query sees.
        sinks: as in `LayerCache`.
        scale: scale of q . k.
    """

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    ends: torch.Tensor
    sinks: torch.Tensor | None
    scale: float


class MaskedAttention(GatheringAttention):
    """Says which tokens each query sees; subclasses attend to them."""

    name = "sdpa"  # what the setting calls all that needs torch only

    def __init__(self, buffer: GatherBuffer) -> None:
        super().__init__(buffer)
        width, device = buffer.keys.shape[1], buffer.keys.device
        self.position = make_lasting(lambda: torch.arange(width, device=device))

    def attend(
        self,
        query: torch.Tensor,
        sinks: torch.Tensor | None,
        group: RowGroup,
        rows: GatheredRows,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        if group.max_query_len == 1:  # row `r` is query `r` of the group
            queries = slice(rows.first, rows.last)
            # A padded row sees a zero: nothing at all would be a NaN.
            ends = rows.lengths[:, None].clamp(min=1)
            asked = MaskedQueries(query[queries], rows.keys, rows.values, ends, sinks, scale)
            self.attend_lines(asked, out[queries])
            return
        for line, row in enumerate(range(rows.first, rows.last)):
            start, count = int(group.query_starts[row]), int(group.query_lens[row])
            if not count:
                continue
            queries = slice(start, start + count)
            # The last query sees all tokens of the row, the one before it all but the last.
            ends = rows.lengths[line] - (count - 1) + self.position[:count, None]
            keys, values = rows.keys[line], rows.values[line]
            asked = MaskedQueries(query[queries], keys, values, ends, sinks, scale)
            self.attend_line(asked, out[queries])

    @abstractmethod
    def attend_lines(self, asked: MaskedQueries, out: torch.Tensor) -> None:
        """Attend each query to a line of its own, into `out` [n, Hq, D]."""

    @abstractmethod
    def attend_line(self, asked: MaskedQueries, out: torch.Tensor) -> None:
        """Attend all queries to one line, into `out` [n, Hq, D]."""


class SdpaAttention(MaskedAttention):
    """PyTorch's scaled_dot_product_attention, which has neither sinks nor soft caps.

    Of its kernels only the one that writes every logit down lets heads share keys, and it copies the keys
    for each of them: heads are handed over in another dimension's place.
    """

    def attend_lines(self, asked: MaskedQueries, out: torch.Tensor) -> None:
        num_kv_heads, head_size = asked.keys.shape[2:]
        # Heads that share keys take the place of queries: [n, Hkv, group, D].
        attended = F.scaled_dot_product_attention(
            asked.query.reshape(len(out), num_kv_heads, -1, head_size),
            asked.keys.transpose(1, 2),
            asked.values.transpose(1, 2),
            attn_mask=(self.position < asked.ends)[:, None, None],
            scale=asked.scale,
        )
        out.copy_(attended.flatten(1, 2))

    def attend_line(self, asked: MaskedQueries, out: torch.Tensor) -> None:
        num_kv_heads, head_size = asked.keys.shape[1:]
        # Heads that share keys take the place of requests: [group, Hkv, queries, D].
        grouped = asked.query.reshape(len(out), num_kv_heads, -1, head_size).permute(2, 1, 0, 3)
        keys, values = (
            line.transpose(0, 1).expand(len(grouped), -1, -1, -1)
            for line in (asked.keys, asked.values)
        )
        attended = F.scaled_dot_product_attention(
            grouped, keys, values, attn_mask=self.position < asked.ends, scale=asked.scale
        )
        out.copy_(attended.permute(2, 1, 0, 3).flatten(1, 2))

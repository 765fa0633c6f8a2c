"""Attention with sinks and soft caps over gathered tokens, by PyTorch's plain operations.

The fallback for what `scaled_dot_product_attention` does not have; it writes every logit down, in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vllm_tokenselect.gpu.attention import GatherBuffer
from vllm_tokenselect.gpu.masked_attention import MaskedAttention, MaskedQueries

# Widened keys and values, and logits, of what is attended together; at least of one query.
PLAIN_BYTES = 64 << 20


def attend_plainly(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: torch.Tensor,
    scale: float,
    soft_cap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """`softmax([cap * tanh(q . k * scale / cap), sink])` over the visible keys and the sink, times values.

    Args:
        query: fp32, bf16 or fp16 [R, n, Hq, D].
        keys, values: of any of these dtypes [R, m, Hkv, D].
        visible: bool [R, n, m]; a query sees at least one key.
        scale: scale of q . k.
        soft_cap: 0 for none.
        sinks: [Hq]; None for none.

    Returns:
        [R, n, Hq, D], of the query's dtype.
    """
    num_tokens, num_kv_heads = keys.shape[1:3]
    num_rows, num_queries, _, head_size = query.shape
    # [R, n, Hkv, group, D]
    grouped = query.float().view(num_rows, num_queries, num_kv_heads, -1, head_size)
    logits = torch.einsum("rnhgd,rmhd->rhgnm", grouped, keys.float()).mul_(scale)
    if soft_cap:
        logits = logits.div_(soft_cap).tanh_().mul_(soft_cap)
    logits = logits.masked_fill_(~visible[:, None, None], float("-inf"))
    if sinks is not None:
        column = sinks.float().view(num_kv_heads, -1, 1, 1).expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, column], dim=-1)
    weights = logits.softmax(dim=-1)[..., :num_tokens]
    attended = torch.einsum("rhgnm,rmhd->rnhgd", weights, values.float())
    return attended.flatten(2, 3).to(query.dtype)


class PlainAttention(MaskedAttention):
    """Attends as many queries at a time as `PLAIN_BYTES` hold.

    Args:
        soft_cap: of the logits; 0 for none.
    """

    scratch_bytes = PLAIN_BYTES

    def __init__(self, buffer: GatherBuffer, soft_cap: float) -> None:
        super().__init__(buffer)
        self.soft_cap = soft_cap

    def attend_lines(self, asked: MaskedQueries, out: torch.Tensor) -> None:
        line, logits = self._bytes(asked.query)
        for some in _parts(len(asked.query), PLAIN_BYTES // (line + logits)):
            visible = (self.position < asked.ends[some])[:, None]  # [some, 1, width]
            out[some] = self._attend(
                asked, asked.query[some, None], asked.keys[some], asked.values[some], visible
            )[:, 0]

    def attend_line(self, asked: MaskedQueries, out: torch.Tensor) -> None:
        line, logits = self._bytes(asked.query)
        for some in _parts(len(asked.query), (PLAIN_BYTES - line) // logits):
            visible = (self.position < asked.ends[some])[None]  # [1, some, width]
            out[some] = self._attend(
                asked, asked.query[None, some], asked.keys[None], asked.values[None], visible
            )[0]

    def _attend(
        self,
        asked: MaskedQueries,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        visible: torch.Tensor,
    ) -> torch.Tensor:
        scale, sinks = asked.scale, asked.sinks
        return attend_plainly(query, keys, values, visible, scale, self.soft_cap, sinks)

    def _bytes(self, query: torch.Tensor) -> tuple[int, int]:
        """Of a line's widened keys and values, and of a query's logits, of which there are three copies."""
        _, width, num_kv_heads, head_size = self.buffer.keys.shape
        return 4 * 2 * width * num_kv_heads * head_size, 4 * 3 * width * query.shape[1]


def _parts(length: int, size: int) -> Iterator[slice]:
    """Slices of so many, of one at least."""
    size = max(size, 1)
    return (slice(start, start + size) for start in range(0, length, size))

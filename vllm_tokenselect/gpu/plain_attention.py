"""Attention with sinks and soft caps over gathered tokens, by PyTorch's plain operations.

The fallback for what `scaled_dot_product_attention` does not have; it writes every logit down, in fp32.
"""

from __future__ import annotations

import torch

from vllm_tokenselect.device_memory import make_lasting
from vllm_tokenselect.gpu.attention import GatherBuffer
from vllm_tokenselect.gpu.rows import RowGroup
from vllm_tokenselect.kernels.layer_cache import LayerCache

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


class PlainAttention:
    """Attends the rows of a gathered buffer. A CUDA graph may capture rows of one query.

    Args:
        buffer: scratch, shared by layers.
        soft_cap: of the logits; 0 for none.
    """

    name = "sdpa"  # what the setting calls all that needs torch only
    scratch_bytes = PLAIN_BYTES

    def __init__(self, buffer: GatherBuffer, soft_cap: float) -> None:
        self.buffer = buffer
        self.buffer_bytes = buffer.num_bytes
        self.soft_cap = soft_cap
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
                self._attend_single_queries(query, cache, lengths, first, last, scale, out)
                continue
            for row in range(first, last):
                start, count = int(group.query_starts[row]), int(group.query_lens[row])
                queries = slice(start, start + count)
                self._attend_row(
                    query[queries], cache, lengths[row], row - first, scale, out[queries]
                )

    def _attend_single_queries(
        self,
        query: torch.Tensor,
        cache: LayerCache,
        lengths: torch.Tensor,
        first: int,
        last: int,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        """Rows of one query each: row `r` is query `r` of the group."""
        line, logits = self._bytes(query)
        together = max(PLAIN_BYTES // (line + logits), 1)
        for start in range(first, last, together):
            rows = slice(start, min(start + together, last))
            lines = slice(rows.start - first, rows.stop - first)
            # A padded row sees a zero: nothing at all would be a NaN.
            visible = self.position < lengths[rows, None].clamp(min=1)  # [rows, width]
            out[rows] = self._attend(query[rows, None], cache, lines, visible[:, None], scale)[:, 0]

    def _attend_row(
        self,
        query: torch.Tensor,
        cache: LayerCache,
        length: torch.Tensor,
        line: int,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        """All queries of a row: the last sees all tokens of the row, the one before it all but the last."""
        line_bytes, logits = self._bytes(query)
        together = max((PLAIN_BYTES - line_bytes) // logits, 1)
        for start in range(0, len(query), together):
            some = slice(start, min(start + together, len(query)))
            last_visible = length - len(query) + self.position[some, None]
            visible = self.position <= last_visible  # [some, width]
            lines = slice(line, line + 1)
            out[some] = self._attend(query[None, some], cache, lines, visible[None], scale)[0]

    def _attend(
        self,
        query: torch.Tensor,
        cache: LayerCache,
        lines: slice,
        visible: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        keys, values = self.buffer.keys[lines], self.buffer.values[lines]
        return attend_plainly(query, keys, values, visible, scale, self.soft_cap, cache.sinks)

    def _bytes(self, query: torch.Tensor) -> tuple[int, int]:
        """Of a line's widened keys and values, and of a query's logits, of which there are three copies."""
        _, width, num_kv_heads, head_size = self.buffer.keys.shape
        return 4 * 2 * width * num_kv_heads * head_size, 4 * 3 * width * query.shape[1]

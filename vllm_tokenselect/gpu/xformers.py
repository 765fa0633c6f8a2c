"""xformers' memory_efficient_attention over gathered tokens."""

from __future__ import annotations

import torch
from xformers.ops import memory_efficient_attention_forward
from xformers.ops.fmha.attn_bias import BlockDiagonalCausalWithOffsetPaddedKeysMask

from vllm_tokenselect.gpu.attention import GatheredRows, GatheringAttention
from vllm_tokenselect.gpu.rows import RowGroup
from vllm_tokenselect.method.requests import Int32


class XformersAttention(GatheringAttention):
    """Attends all gathered rows in one call; no CUDA graph, since its mask is made on the host."""

    name = "xformers"

    def attend(
        self,
        query: torch.Tensor,
        sinks: torch.Tensor | None,
        group: RowGroup,
        rows: GatheredRows,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        num_kv_heads, head_size = rows.keys.shape[2:]
        query_lens = group.query_lens[rows.first : rows.last]
        start, num_queries = int(group.query_starts[rows.first]), int(query_lens.sum())
        queries = slice(start, start + num_queries)
        # [1, queries, KV heads, heads that share one, head size]
        grouped = query[queries].view(num_queries, num_kv_heads, -1, head_size)[None]
        shape = (1, -1, num_kv_heads, grouped.shape[3], head_size)
        keys, values = (
            tensor.flatten(0, 1)[None, :, :, None].expand(shape)
            for tensor in (rows.keys, rows.values)
        )
        attended = memory_efficient_attention_forward(
            grouped, keys, values, attn_bias=_mask(query_lens, rows), scale=scale
        )
        out[queries] = attended[0].flatten(1, 2)


def _mask(query_lens: Int32, rows: GatheredRows) -> BlockDiagonalCausalWithOffsetPaddedKeysMask:
    """Each row's queries see its own line, causally, aligned to the row's last token.

    The host knows no row's length; it says the longest, and the real ones lie on the device.
    """
    width = rows.keys.shape[1]
    mask = BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
        q_seqlen=query_lens.tolist(),
        kv_padding=width,
        kv_seqlen=[width] * len(query_lens),
        device=rows.lengths.device,
    )
    mask.k_seqinfo.seqlen = rows.lengths
    return mask

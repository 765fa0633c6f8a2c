"""xformers' memory_efficient_attention over gathered tokens."""

from __future__ import annotations

import torch
from xformers.ops import memory_efficient_attention_forward
from xformers.ops.fmha.attn_bias import BlockDiagonalCausalWithOffsetPaddedKeysMask

from vllm_tokenselect.gpu.attention import GatherBuffer
from vllm_tokenselect.gpu.rows import RowGroup
from vllm_tokenselect.kernels.layer_cache import LayerCache


class XformersAttention:
    """Attends the rows of a gathered buffer in one call; no CUDA graph, its mask is made on the host.

    Args:
        buffer: scratch, shared by layers.
    """

    name = "xformers"
    scratch_bytes = 0

    def __init__(self, buffer: GatherBuffer) -> None:
        self.buffer = buffer
        self.buffer_bytes = buffer.num_bytes

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
        num_kv_heads, head_size = self.buffer.keys.shape[2:]
        for first, last in self.buffer.gather(cache, slots, lengths):
            start = int(group.query_starts[first])
            num_queries = int(group.query_lens[first:last].sum())
            queries = slice(start, start + num_queries)
            # [1, queries, KV heads, heads that share one, head size]
            grouped = query[queries].view(num_queries, num_kv_heads, -1, head_size)[None]
            shape = (1, -1, num_kv_heads, grouped.shape[3], head_size)
            keys, values = (
                tensor[: last - first].flatten(0, 1)[None, :, :, None].expand(shape)
                for tensor in (self.buffer.keys, self.buffer.values)
            )
            attended = memory_efficient_attention_forward(
                grouped,
                keys,
                values,
                attn_bias=self._mask(group, lengths, first, last),
                scale=scale,
            )
            out[queries] = attended[0].flatten(1, 2)

    def _mask(
        self, group: RowGroup, lengths: torch.Tensor, first: int, last: int
    ) -> BlockDiagonalCausalWithOffsetPaddedKeysMask:
        """Each row's queries see its own line, causally, aligned to the row's last token.

        The host knows no row's length; it says the longest, and the real ones lie on the device.
        """
        width = self.buffer.keys.shape[1]
        mask = BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
            q_seqlen=group.query_lens[first:last].tolist(),
            kv_padding=width,
            kv_seqlen=[width] * (last - first),
            device=lengths.device,
        )
        mask.k_seqinfo.seqlen = lengths[first:last]
        return mask

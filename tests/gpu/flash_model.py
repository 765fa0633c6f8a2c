"""A model of vLLM's FlashAttention: it refuses what the library refuses, and multiplies what it multiplies.

Read from `flash_attn_varlen_func` of vLLM 0.32 and 0.33, and from the host code and the kernels that it
calls: `mha_varlen_fwd` of version 2, `mha_fwd` of version 3, `_flash_attn_fwd` of version 4.
"""

from __future__ import annotations

import torch

MULTIPROCESSORS, TILE = 132, 128
HEAD_SIZES = {2: range(8, 257, 8), 3: range(8, 257, 8), 4: [*range(8, 129, 8), 256]}


def require(condition: bool, what: str) -> None:
    if not condition:
        raise RuntimeError(what)


class FlashAttentionModel:
    """`flash_attn_varlen_func` for a paged cache.

    Args:
        version: 2, 3 or 4. That version alone is built.
        attends: whether outputs are computed; without, calls are only checked.

    Attributes:
        most_bytes: largest allocation for partial outputs.
    """

    def __init__(self, version: int, attends: bool = True) -> None:
        self.version = version
        self.attends = attends
        self.most_bytes = 0

    def __call__(
        self,
        q,
        k,
        v,
        max_seqlen_q,
        cu_seqlens_q,
        max_seqlen_k,
        seqused_k,
        softmax_scale,
        softcap=0.0,
        causal=False,
        block_table=None,
        return_softmax_lse=False,
        out=None,
        num_splits=0,
        fa_version=2,
        s_aux=None,
    ):
        require(fa_version == self.version, f"FlashAttention {fa_version} is not built")
        require(causal, "the rows' masks are causal, aligned to the lower right")
        self._check(q, k, v, cu_seqlens_q, seqused_k, block_table, out)
        self._check_sinks(q, s_aux)
        batch, group = len(seqused_k), q.shape[1] // k.shape[2]
        starts = cu_seqlens_q.tolist()
        if self.version == 2:
            require(k.shape[1] % 16 == 0, "paged KV cache block size must be divisible by 16")
            require(num_splits <= 1, "FA2 does not support num_splits > 1")
            if max_seqlen_q == 1 and group > 1:
                # Query heads of a KV head take the place of queries; the starts are not read.
                require(len(q) == batch, f"shape of {len(q)} queries is invalid for {batch} rows")
                starts = [*range(batch + 1)]
        require(starts == sorted(starts) and starts[0] >= 0, "starts must ascend")
        require(starts[-1] <= len(q), "queries lie behind the last")
        self._allocate(q, k, batch, max_seqlen_q, max_seqlen_k, num_splits)
        # Of queries of no row it is whatever lies there.
        lse = torch.full((q.shape[1], len(q)), float("nan"), device=q.device)
        for line, length in enumerate(seqused_k.tolist()):
            queries = slice(*starts[line : line + 2])
            require(queries.stop - queries.start <= max_seqlen_q, "more queries than max_seqlen_q")
            require(length <= max_seqlen_k, "more keys than max_seqlen_k")
            require(length <= block_table.shape[1] * k.shape[1], "more keys than pages")
            if self.attends and queries.stop > queries.start:
                out[queries], lse[:, queries] = self._attend(
                    q[queries],
                    k,
                    v,
                    block_table[line],
                    length,
                    softmax_scale,
                    softcap,
                    s_aux,
                )
        return (out, lse) if return_softmax_lse else out

    def _check_sinks(self, q, sinks) -> None:
        if sinks is None:
            return
        require(self.version > 2, "FA2 does not support s_aux")
        require(sinks.shape == (q.shape[1],), "s_aux must have shape (num_heads)")
        require(sinks.device == q.device and sinks.is_contiguous(), "s_aux must be contiguous")
        if self.version == 3:
            require(sinks.dtype == torch.bfloat16, "We only support bf16 dtype for S aux.")
            require(q.shape[1] <= 64, "We only support query heads <= 64 with S aux")
        require(sinks.dtype.is_floating_point, "learnable_sink must be a float")

    def _check(self, q, k, v, cu_seqlens_q, seqused_k, block_table, out) -> None:
        batch = len(cu_seqlens_q) - 1
        require(batch > 0, "batch size must be positive")
        for tensor in (q, k, v, out):
            # fp32, which the library has no kernels for, lets tests compare closely.
            require(tensor.dtype == q.dtype, "queries, keys, values and outputs have one dtype")
            require(tensor.dtype.itemsize > 1, "quantized keys need descales")
            require(tensor.stride(-1) == 1, "must have contiguous last dimension")
        for tensor in (cu_seqlens_q, seqused_k, block_table):
            require(tensor.dtype == torch.int32, "must have dtype int32")
        for tensor in (k, v, out, cu_seqlens_q, seqused_k, block_table):
            require(tensor.device == q.device, "must be on CUDA")
        require(cu_seqlens_q.is_contiguous() and seqused_k.is_contiguous(), "must be contiguous")
        require(block_table.stride(-1) == 1, "block_table must have contiguous last dimension")
        require(k.shape == v.shape and k.dim() == 4, "pages [pages, tokens, KV heads, head size]")
        require(q.shape[2] == k.shape[3], "head sizes differ")
        require(q.shape[1] % k.shape[2] == 0, "query heads must be a multiple of KV heads")
        require(out.shape == q.shape, f"out must have shape {tuple(q.shape)}")
        require(seqused_k.shape == (batch,), "seqused_k must have shape (batch_size)")
        require(len(block_table) == batch, "batch_size must be equal to batch_size_k")
        require(q.shape[2] in HEAD_SIZES[self.version], f"head size {q.shape[2]} is not supported")

    def _allocate(self, q, k, batch, max_seqlen_q, max_seqlen_k, num_splits) -> None:
        """Partial outputs and their logarithms, for every query that was handed over."""
        num_queries, num_heads, head_size = q.shape
        parts = -(-max_seqlen_k // TILE)
        tiles = -(-max_seqlen_q * num_heads // k.shape[2] // TILE)
        if self.version == 2:
            return
        if self.version == 3:
            require(num_splits <= 256, "num_splits > 256 not supported")
            if num_splits <= 0:  # an upper bound: one row may be much longer than the others
                full = k.shape[2] * tiles >= 0.8 * MULTIPROCESSORS
                num_splits = 1 if full else min(parts, 128)
        elif num_splits <= 0:
            num_splits = min(MULTIPROCESSORS // (batch * k.shape[2] * tiles), 128, parts)
        if num_splits > 1:
            num_bytes = 4 * num_splits * num_heads * num_queries * (head_size + 1)
            self.most_bytes = max(self.most_bytes, num_bytes)

    def _attend(self, q, k, v, pages, length, scale, softcap, sinks):
        """One row's outputs, and the logarithms of its denominators [Hq, n].

        What is hidden has a weight of 0, by which it is multiplied where tiles are copied.
        """
        page, group = k.shape[1], q.shape[1] // k.shape[2]
        # Pages of whole tiles are copied by TMA, behind the last token too. Versions that copy tokens
        # write zeros there.
        copied = -(-length // page) * page if self.version > 2 and page % TILE == 0 else length
        position = torch.arange(copied, device=q.device)
        place = pages[position // page].long(), position % page
        keys, values = (x[place].repeat_interleave(group, 1) for x in (k, v))
        logits = torch.einsum("nhd,mhd->hnm", q, keys) * scale
        if softcap > 0:
            logits = softcap * torch.tanh(logits / softcap)
        seen = torch.arange(len(q), device=q.device)[:, None] + length - len(q)
        logits = logits.masked_fill(position > seen, float("-inf"))
        largest = logits.amax(-1, keepdim=True) if copied else logits.sum(-1, keepdim=True)
        largest = largest.masked_fill(largest.isinf(), 0)
        weights = (logits - largest).exp()
        total = weights.sum(-1, keepdim=True)
        if sinks is not None:
            total = total + (sinks.float()[:, None, None] - largest).exp()
        weights = weights / total.masked_fill(total == 0, 1)
        lse = (largest + total.log()).masked_fill(total == 0, float("inf"))[..., 0]
        return torch.einsum("hnm,mhd->nhd", weights, values), lse

"""Full attention by others, over the same data: FlashAttention 3, SDPA, FlexAttention, Triton."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.attention.cases import Data

Call = Callable[[int], object]


class Unavailable(Exception):
    """A baseline that cannot run here; the message says why."""


def flash_varlen() -> Callable[..., object]:
    """FlashAttention 3 as vLLM builds it.

    Raises:
        Unavailable: without vLLM, or on a GPU that it is not for.
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        raise Unavailable("FlashAttention 3 is for GPUs of compute capability 9")
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func
    except ImportError as error:
        raise Unavailable(f"vLLM's FlashAttention does not load: {error}") from None
    return partial(flash_attn_varlen_func, fa_version=3)


def paged_arguments(data: Data) -> dict[str, object]:
    """What vLLM's attention over pages is called with, whichever kernel it is; but for the block table."""
    work = data.work
    keys, values = data.pages.split(work.shape.head_size, dim=-1)
    starts = torch.arange(work.batch + 1, dtype=torch.int32, device=data.query.device)
    starts *= work.queries
    return {
        "q": data.query,
        "k": keys,
        "v": values,
        "cu_seqlens_q": starts,
        "max_seqlen_q": work.queries,
        "seqused_k": data.seq_lens,
        "max_seqlen_k": work.context,
        "softmax_scale": work.shape.scale,
        "causal": True,
        "out": data.out,
    }


def flash_attention(data: Data) -> Call:
    varlen, arguments = flash_varlen(), paged_arguments(data)
    return lambda turn: varlen(**arguments, block_table=data.block_table(turn))


def triton_attention(data: Data) -> Call:
    if not data.query.is_cuda:
        raise Unavailable("vLLM's Triton attention is for GPUs")
    try:
        from vllm.v1.attention.ops.triton_unified_attention import unified_attention
    except ImportError as error:
        raise Unavailable(f"vLLM does not load: {error}") from None
    arguments = paged_arguments(data)
    return lambda turn: unified_attention(
        **arguments,
        block_table=data.block_table(turn),
        window_size=(-1, -1),
        softcap=0,
        q_descale=None,
        k_descale=None,
        v_descale=None,
    )


def _contiguous(data: Data) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values [batch, heads, tokens, D], as unpaged attention wants them.

    Raises:
        Unavailable: when a second copy of the context does not fit the memory.
    """
    work = data.work
    if data.query.is_cuda and work.full_bytes > 0.4 * torch.cuda.mem_get_info()[0]:
        raise Unavailable("no memory for an unpaged copy of the context")
    pages = data.pages[data.block_table(0).long()].flatten(1, 2)[:, : work.context]
    keys, values = pages.transpose(1, 2).split(work.shape.head_size, dim=-1)
    query = data.query.unflatten(0, (work.batch, work.queries)).transpose(1, 2)
    return query, keys.contiguous(), values.contiguous()


def sdpa_flash(data: Data) -> Call:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.bias import causal_lower_right

    query, keys, values = _contiguous(data)
    mask = None if data.work.queries == 1 else causal_lower_right(query.shape[2], keys.shape[2])

    def call(turn: int) -> object:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(
                query, keys, values, mask, scale=data.work.shape.scale, enable_gqa=True
            )

    return call


def flex_attention(data: Data) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as flex

    if not data.query.is_cuda:
        raise Unavailable("FlexAttention is compiled for GPUs")
    query, keys, values = _contiguous(data)
    before = data.work.context - data.work.queries

    def causal(
        batch: torch.Tensor, head: torch.Tensor, row: torch.Tensor, column: torch.Tensor
    ) -> torch.Tensor:
        return row + before >= column

    mask = None
    if data.work.queries > 1:
        mask = create_block_mask(causal, None, None, query.shape[2], keys.shape[2])
    compiled = torch.compile(flex)

    def call(turn: int) -> object:
        return compiled(
            query,
            keys,
            values,
            block_mask=mask,
            scale=data.work.shape.scale,
            enable_gqa=True,
        )

    return call


BASELINES: dict[str, Callable[[Data], Call]] = {
    "FA3": flash_attention,
    "SDPA flash": sdpa_flash,
    "FlexAttention": flex_attention,
    "vLLM Triton": triton_attention,
}

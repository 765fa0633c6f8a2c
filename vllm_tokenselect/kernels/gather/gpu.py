"""Gather on a GPU: the tokens of every row into its line of a buffer, rotated on the way if asked."""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_tokenselect.kernels.gpu_launch import is_fp8

TOKENS_PER_PROGRAM = 32
# Elements of keys that a program holds; more would not fit its registers.
ELEMENTS_PER_PROGRAM = 32 * 256


def gather_rows(
    kv_cache: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    out_keys: torch.Tensor,
    out_values: torch.Tensor,
    cos_sin: torch.Tensor | None = None,
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
    zeroed: int = 1,
) -> None:
    """As `reference.gather_rows`, for tensors on a GPU.

    Args:
        kv_cache: of any strides whose last is 1; fp8 as well, with both scales.
        out_keys, out_values: contiguous [R, W, Hkv, D]; fp32, bf16 or fp16.
    """
    num_rows, width = len(slots), out_keys.shape[1]
    num_kv_heads, block_size, head_size = kv_cache.shape[1], *kv_cache.shape[3:]
    if not num_rows or not width:
        return
    rotated = 0 if cos_sin is None else cos_sin.shape[1]
    padded_size = triton.next_power_of_2(head_size)
    tokens = min(TOKENS_PER_PROGRAM, ELEMENTS_PER_PROGRAM // padded_size)
    _gather[(num_kv_heads, triton.cdiv(width, tokens), num_rows)](
        kv_cache,
        slots,
        lengths,
        out_keys,
        out_values,
        cos_sin,
        key_scale,
        value_scale,
        width,
        slots.stride(0),
        out_keys.stride(0),
        kv_cache.stride(0),
        kv_cache.stride(1),
        kv_cache.stride(2),
        kv_cache.stride(3),
        HEAD_SIZE=head_size,
        PADDED_SIZE=padded_size,
        ROTATED=rotated,
        ZEROED=zeroed,
        BLOCK_SIZE=block_size,
        TOKENS=tokens,
        QUANTIZED=is_fp8(kv_cache.dtype),
        num_warps=4,
    )


@triton.jit(do_not_specialize_on_alignment=["lengths"])
def _gather(
    kv_cache,
    slots,
    lengths,
    out_keys,
    out_values,
    cos_sin,
    key_scale,
    value_scale,
    width,
    slots_stride,
    out_stride,
    block_stride,
    head_stride,
    value_offset,
    token_stride,
    HEAD_SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    ROTATED: tl.constexpr,
    ZEROED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    QUANTIZED: tl.constexpr,
):
    """`out_keys[r, i] = rotate(key[slots[r, i]] * key_scale, i)`, the values alike but for the rotation.

    Zeros behind a row's length, up to the next multiple of `ZEROED`. As `reference.gather_rows`.
    """
    kv_head, num_kv_heads = tl.program_id(0), tl.num_programs(0)
    row = tl.program_id(2).to(tl.int64)
    length = tl.load(lengths + row)
    entry = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    end = tl.minimum(tl.cdiv(tl.maximum(length, 1), ZEROED) * ZEROED, width)
    if tl.program_id(1) * TOKENS < end:
        visible, written = entry < length, entry < end
        # [TOKENS]
        slot = tl.load(slots + row * slots_stride + entry, visible, 0).to(tl.int64)
        token = (slot // BLOCK_SIZE) * block_stride + (slot % BLOCK_SIZE) * token_stride
        source = kv_cache + token + kv_head.to(tl.int64) * head_stride
        target = row * out_stride + (entry * num_kv_heads + kv_head) * HEAD_SIZE
        element = tl.arange(0, PADDED_SIZE)
        in_head = (element < HEAD_SIZE)[None, :]
        mask = visible[:, None] & in_head
        # [TOKENS, PADDED_SIZE]
        keys = tl.load(source[:, None] + element[None, :], mask, 0.0)
        values = tl.load(source[:, None] + value_offset + element[None, :], mask, 0.0)
        if QUANTIZED:
            keys = keys.to(tl.float32) * tl.load(key_scale)
            values = values.to(tl.float32) * tl.load(value_scale)
        if ROTATED > 0:
            # Pairs are half of the rotated part apart (NeoX): the other half is read once more.
            half: tl.constexpr = ROTATED // 2
            in_rotated = element < ROTATED
            partner = tl.where(element < half, element + half, element - half)
            turned = mask & in_rotated[None, :]
            # [TOKENS, PADDED_SIZE], and so are the angles
            partners = tl.load(source[:, None] + partner[None, :], turned, 0.0).to(tl.float32)
            if QUANTIZED:
                partners = partners * tl.load(key_scale)
            pair = element % half
            angle = cos_sin + entry[:, None] * ROTATED + pair[None, :]
            cosine = tl.load(angle, turned, 1.0).to(tl.float32)
            sine = tl.load(angle + half, turned, 0.0).to(tl.float32)
            sign = tl.where(element < half, -1.0, 1.0)
            keys = keys.to(tl.float32) * cosine + partners * (sine * sign[None, :])
        # [TOKENS, PADDED_SIZE]; what was not loaded is zero, whatever is done to it.
        tl.store(out_keys + target[:, None] + element[None, :], keys, written[:, None] & in_head)
        tl.store(
            out_values + target[:, None] + element[None, :], values, written[:, None] & in_head
        )

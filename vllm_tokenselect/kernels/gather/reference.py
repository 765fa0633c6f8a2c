"""Readable definition of the gather."""

from __future__ import annotations

import torch

from vllm_tokenselect.kernels.rotate.reference import rotate


def gather_tokens(
    kv_cache: torch.Tensor,
    slots: torch.Tensor,
    out_keys: torch.Tensor,
    out_values: torch.Tensor,
    cos_sin: torch.Tensor | None = None,
) -> None:
    """Copy the cached tokens that `slots` names, in its order, and rotate the keys if asked.

    Args:
        kv_cache: fp32, bf16 or fp16 [num_blocks, Hkv, 2, block_size, D], contiguous.
        slots: int32 [n], `block_id * block_size + offset`.
        out_keys, out_values: [n, Hkv, D] of the cache's dtype, written.
        cos_sin: fp32 [positions, rotated], as in `Rotation`; token `i` is rotated to position `i`.
    """
    block_size = kv_cache.shape[3]
    index = slots.long()
    tokens = kv_cache[index // block_size, :, :, index % block_size]  # [n, Hkv, 2, D]
    keys = tokens[:, :, 0]
    out_keys.copy_(keys if cos_sin is None else rotate(keys, cos_sin[: len(slots)]))
    out_values.copy_(tokens[:, :, 1])


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
    """Copy the tokens of every row into its line of a buffer, and rotate the keys if asked.

    Args:
        kv_cache: fp32, bf16, fp16 or fp8 [num_blocks, Hkv, 2, block_size, D].
        slots: int32 [R, width], sparse block table of page size 1.
        lengths: int32 [R], entries of each row.
        out_keys, out_values: [R, W, Hkv, D], written up to each row's length, and with zeros behind it.
        cos_sin: fp32 [positions, rotated], as in `Rotation`; entry `i` of a row is rotated to
            position `i`.
        key_scale, value_scale: fp32 [1], what a quantized cache is multiplied by.
        zeroed: a row ends with zeros at a multiple of it (at least at the first), or where its line ends.
            Attention hides what is behind a row, but multiplies with it: a NaN there would be seen.
    """
    block_size = kv_cache.shape[3]
    for row, length in enumerate(lengths.tolist()):
        index = slots[row, :length].long()
        tokens = kv_cache.float()[index // block_size, :, :, index % block_size]  # [n, Hkv, 2, D]
        keys = tokens[:, :, 0] * (1.0 if key_scale is None else key_scale.float())
        values = tokens[:, :, 1] * (1.0 if value_scale is None else value_scale.float())
        if cos_sin is not None:
            keys = rotate(keys, cos_sin[:length])
        end = -(-max(length, 1) // zeroed) * zeroed
        out_keys[row, :end] = out_values[row, :end] = 0
        out_keys[row, :length] = keys.to(out_keys.dtype)
        out_values[row, :length] = values.to(out_values.dtype)

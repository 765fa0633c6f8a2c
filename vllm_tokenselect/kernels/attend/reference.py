"""Readable definition of attention over a sparse block table."""

from __future__ import annotations

import torch

from vllm_tokenselect.kernels.rotate.reference import rotate


def attend(
    query: torch.Tensor,
    query_start_loc: torch.Tensor,
    kv_cache: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    cos_sin: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    soft_cap: float = 0.0,
) -> None:
    """Attend every row's queries to the tokens that its line of `slots` names.

    The causal mask is aligned to the lower right: a row's last query sees all of its tokens, the one
    before it all but the last. That is exact because whatever was selected precedes the row's queries.

    Args:
        query: fp32, bf16 or fp16 [T, Hq, D].
        query_start_loc: int32 [R + 1], where each row's queries start in `query`.
        kv_cache: fp32, bf16 or fp16 [num_blocks, Hkv, 2, block_size, D], contiguous.
        slots: int32 [R, width], sparse block table of page size 1.
        lengths: int32 [R], entries of each row.
        scale: scale of q . k.
        out: [T, Hq, D] of the query's dtype, written; a query that sees no token gives zeros.
        cos_sin: fp32 [positions, rotated], as in `Rotation`: the tokens of a row are rotated to the
            positions `0 .. m - 1` in their order, its queries to the last of these.
        sinks: [Hq], as in `attention_weights`.
        soft_cap: as in `cap_scores`.
    """
    num_kv_heads, block_size = kv_cache.shape[1], kv_cache.shape[3]
    group = query.shape[1] // num_kv_heads
    starts = query_start_loc.tolist()
    for row, length in enumerate(lengths.tolist()):
        queries = slice(starts[row], starts[row + 1])
        index = slots[row, :length].long()
        tokens = kv_cache[index // block_size, :, :, index % block_size].float()  # [m, Hkv, 2, D]
        keys, values = tokens.repeat_interleave(group, dim=1).unbind(dim=2)  # [m, Hq, D]
        num_queries = starts[row + 1] - starts[row]
        asking = query[queries].float()
        if cos_sin is not None:
            keys = rotate(keys, cos_sin[:length])
            asking = rotate(asking, cos_sin[length - num_queries : length])
        logits = cap_scores(torch.einsum("nhd,mhd->hnm", asking, keys) * scale, soft_cap)
        visible = torch.ones(num_queries, length, dtype=torch.bool, device=query.device)
        visible = visible.tril(length - num_queries)
        weights = attention_weights(logits, visible, sinks)
        out[queries] = torch.einsum("hnm,mhd->nhd", weights, values).to(out.dtype)


def cap_scores(scores: torch.Tensor, soft_cap: float) -> torch.Tensor:
    """`cap * tanh(score / cap)` of any scores; a cap of 0 is none."""
    return soft_cap * torch.tanh(scores / soft_cap) if soft_cap else scores


def attention_weights(
    logits: torch.Tensor, visible: torch.Tensor, sinks: torch.Tensor | None
) -> torch.Tensor:
    """Softmax over what is visible, and over a sink that takes its share and gives nothing.

    Args:
        logits: fp32 [Hq, n, m].
        visible: bool [n, m].
        sinks: [Hq], a logit of each head; None for none.

    Returns:
        fp32 [Hq, n, m]; a query that sees no token gets zeros.
    """
    num_heads, num_queries, num_tokens = logits.shape
    logits = logits.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        column = sinks.float()[:, None, None].expand(num_heads, num_queries, 1)
        logits = torch.cat([logits, column], dim=-1)
    weights = logits.softmax(dim=-1)[..., :num_tokens]
    return weights.masked_fill(~visible, 0.0)  # a query without any token: zeros, not NaN


def attend_single_queries(
    query: torch.Tensor,
    query_index: torch.Tensor,
    kv_cache: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    cos_sin: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    soft_cap: float = 0.0,
) -> None:
    """`attend` for rows of one query each: row `r` is `query[query_index[r]]`.

    Args:
        query_index: int32 [R]; the other queries of `query` and `out` [T, Hq, D] are left alone.
    """
    index = query_index.long()
    query_start_loc = torch.arange(len(index) + 1, dtype=torch.int32, device=query.device)
    attended = torch.empty((len(index), *out.shape[1:]), dtype=out.dtype, device=out.device)
    attend(
        query[index],
        query_start_loc,
        kv_cache,
        slots,
        lengths,
        scale,
        attended,
        cos_sin,
        sinks,
        soft_cap,
    )
    out[index] = attended

"""The kernel of the scores: a tile of rows times the keys of a part of the candidates."""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from vllm_tokenselect.kernels.selection_cache.gpu_decide import decide_row
from vllm_tokenselect.kernels.selection_cache.gpu_rows import END_ARRAYS, NUMBERS, ROW_ARRAYS


@triton.jit
def part_size(num_candidates, SMALLEST: tl.constexpr, PARTS: tl.constexpr):
    """Tokens of a part of a row: the least `SMALLEST * 2^k` of which `PARTS` hold its candidates.

    It follows from the row alone, and is a multiple of every smaller one.
    """
    ones = tl.maximum(tl.cdiv(num_candidates, SMALLEST * PARTS), 1) - 1
    for doubling in tl.static_range(5):  # all bits below the highest
        ones |= ones >> (1 << doubling)
    return (ones + 1) * SMALLEST


@triton.jit(
    do_not_specialize=NUMBERS,
    do_not_specialize_on_alignment=[
        *ROW_ARRAYS,
        *END_ARRAYS,
        "tiles",
        "ends",
        "columns",
    ],
)
def score_tile(
    query,
    query_start,
    kv_cache,
    block_table,
    tiles,
    ends,
    columns,
    key_scale,
    logits,
    maxima,
    sums,
    scale,
    start,
    num_columns,
    num_heads,
    query_stride,
    query_head_stride,
    table_stride,
    block_stride,
    head_stride,
    token_stride,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LINES: tl.constexpr,
    SPLITS: tl.constexpr,
    TOKENS: tl.constexpr,
    SMALLEST_PART: tl.constexpr,
    PARTS: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRODUCTS: tl.constexpr,
    WIDEN: tl.constexpr,
    QUANTIZED: tl.constexpr,
    own_query=None,
    own_start=None,
    cached_seats=None,
    owners=None,
    top_k=None,
    candidate_ends=None,
    context_ends=None,
    state_query=None,
    state_end=None,
    state_owner=None,
    table_ends=None,
    reused_ends=None,
    threshold=None,
    refresh_interval=None,
    own_stride=None,
    own_head_stride=None,
    KV_HEADS: tl.constexpr = None,
    GROUP_SIZE: tl.constexpr = None,
    PADDED_GROUP: tl.constexpr = None,
    HEADS_AT_ONCE: tl.constexpr = None,
):
    """`logits[h, first[r] + c] = scale * query[r, h] . key[start + c, h // GROUP]` of the rows of a tile.

    `first[r] = columns[r] - columns[0]`. Beside them, of every part `p` of a row's candidates,
    `maxima[r, h, p] = max over c of logits` and `sums[r, h, p] = sum over c of exp(logits - maxima)`. The
    scores are those of `reference.score_paged_keys`; they are not stored where `logits` is None. With two
    products a query is the sum of two numbers of 16 bits.

    With what decides, a tile has one row. Every program of it decides whether the row reuses a selection,
    which leaves nothing to score; the first program writes `ends`, `table_ends` and `reused_ends`.
    """
    # KV heads vary fastest: the keys that they read lie beside each other.
    kv_head, share, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2) // SPLITS
    seq = tl.load(tiles + tile * 3).to(tl.int64)
    first_row = tl.load(tiles + tile * 3 + 1)
    num_rows = tl.load(tiles + tile * 3 + 2)

    # A line is one query head of one row.
    line = tl.program_id(2) % SPLITS * LINES + tl.arange(0, LINES)
    row, head = first_row + line // GROUP, kv_head * GROUP + line % GROUP
    in_tile = line < num_rows * GROUP
    # [LINES], and so is all that has no second dimension below
    end = tl.load(ends + row, in_tile, start)
    if own_query is not None:
        seat = tl.load(cached_seats + first_row).to(tl.int64)
        if (seat >= 0) & (num_rows > 0):
            # What was loaded may be an end of before, or one that the first program has just written.
            decided = decide_row(
                first_row,
                seat,
                (kv_head == 0) & (share == 0),
                own_query,
                own_start,
                owners,
                top_k,
                candidate_ends,
                context_ends,
                state_query,
                state_end,
                state_owner,
                ends,
                table_ends,
                reused_ends,
                threshold,
                refresh_interval,
                start,
                own_stride,
                own_head_stride,
                HEAD_SIZE,
                KV_HEADS,
                GROUP_SIZE,
                PADDED_GROUP,
                HEADS_AT_ONCE,
            )
            end = tl.where(in_tile, decided, start)
    length = end - start
    # All reuse selections, say; a kernel of more lines, which are seldom all without candidates, would
    # run out of registers for it.
    if LINES <= 64:  # noqa: SIM102 (known when the kernel is compiled)
        if tl.max(length, 0) <= 0:
            return
    length = tl.maximum(length, 0)

    element = tl.arange(0, PADDED_SIZE)
    in_head = element < HEAD_SIZE
    asking = row if query_start is None else tl.load(query_start + row, in_tile, 0)
    source = asking.to(tl.int64) * query_stride + head * query_head_stride
    # [LINES, PADDED_SIZE]
    queries = tl.load(
        query + source[:, None] + element[None, :], in_tile[:, None] & in_head[None, :], 0.0
    )
    high = queries.to(PRODUCT)
    low = high
    if PRODUCTS == 2:
        low = (queries.to(tl.float32) - high.to(tl.float32)).to(PRODUCT)
    if WIDEN:
        high, low = high.to(tl.float32), low.to(tl.float32)
    if QUANTIZED:
        scale = scale * tl.load(key_scale)

    # Programs share the tile by its largest parts, which are whole parts of every row.
    part = part_size(length, SMALLEST_PART, PARTS)
    num_parts = tl.cdiv(length, part)
    reach, unit = tl.max(length, 0), tl.max(part, 0)
    share_size = tl.cdiv(tl.cdiv(reach, unit), tl.num_programs(1)) * unit
    first = tl.multiple_of(share * share_size, TOKENS)
    last = tl.minimum(first + share_size, reach)
    # Numbers of 32 bits: the workspace has fewer than 2^31 scores.
    row_head = row.to(tl.int64) * num_heads + head
    column = tl.load(columns + row, in_tile, 0) - tl.load(columns)
    scored = head * num_columns + tl.multiple_of(column, 4)
    # One loop over all parts: it loads the next keys while it works on these.
    own_part = first // part
    largest = tl.full([LINES], float("-inf"), tl.float32)
    total = tl.zeros([LINES], tl.float32)
    for offset in tl.range(first, last, TOKENS):
        candidate = offset + tl.arange(0, TOKENS)
        visible = candidate < last
        token = start + candidate
        # [TOKENS]
        block = tl.load(block_table + seq * table_stride + token // BLOCK_SIZE, visible, 0)
        place = block.to(tl.int64) * block_stride + (token % BLOCK_SIZE) * token_stride
        # [PADDED_SIZE, TOKENS]
        keys = tl.load(
            kv_cache + kv_head.to(tl.int64) * head_stride + place[None, :] + element[:, None],
            visible[None, :] & in_head[:, None],
            0.0,
        ).to(high.dtype)
        # [LINES, TOKENS]
        if PRODUCTS == 2:
            score = tl.dot(low, keys, input_precision="ieee")
            score = tl.dot(high, keys, score, input_precision="ieee") * scale
        else:
            score = tl.dot(high, keys, input_precision="ieee") * scale
        own_last = tl.minimum(length, last)[:, None]
        own = candidate[None, :] < own_last
        if logits is not None:
            # Four scores at a time: those behind a row's own end are not looked at.
            stored = (candidate // 4 * 4)[None, :] < own_last
            tl.store(logits + (scored[:, None] + candidate[None, :]), score, stored)
        score = tl.where(own, score, float("-inf"))
        above = tl.maximum(largest, tl.max(score, 1))
        shift = tl.where(above == float("-inf"), 0.0, above)
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(score - shift[:, None]), 1)
        following = offset + TOKENS
        # Tokens of the part, or of the program's share, that are left; at the end of either none.
        ends_part = tl.minimum(-following & (part - 1), tl.maximum(last - following, 0)) == 0
        done = ends_part & (own_part < num_parts)
        tl.store(maxima + row_head * PARTS + own_part, above, done)
        tl.store(sums + row_head * PARTS + own_part, total, done)
        own_part += ends_part.to(tl.int32)
        largest = tl.where(ends_part, float("-inf"), above)
        total = tl.where(ends_part, 0.0, total)
    for other in range(share, PARTS, tl.num_programs(1)):
        empty = in_tile & (other >= num_parts)
        tl.store(maxima + row_head * PARTS + other, float("-inf"), empty)
        tl.store(sums + row_head * PARTS + other, 0.0, empty)

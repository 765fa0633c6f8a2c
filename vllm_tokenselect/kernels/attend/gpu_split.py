"""The programs of the own attention: each attends a split of a query's tokens, the last combines all."""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _row_of(query, query_start_loc, num_rows, ROWS: tl.constexpr):
    """The row of a query, and how many of the row's queries are behind it; negative for none."""
    row = -1
    for first in range(0, num_rows, ROWS):
        other = first + tl.arange(0, ROWS)
        # [ROWS]
        start = tl.load(query_start_loc + other, other < num_rows, query + 1)
        row += tl.sum((start <= query).to(tl.int32), 0)
    return row, tl.load(query_start_loc + row + 1) - 1 - query


@triton.jit
def _rotate(own, partners, cosine, sine, element, ROTATED: tl.constexpr):
    """`own * cos -+ partner * sin`: the elements of a pair are half of the rotated part apart (NeoX)."""
    sign = tl.where(element < ROTATED // 2, -1.0, 1.0)
    return own.to(tl.float32) * cosine + partners.to(tl.float32) * (sine * sign)


@triton.jit
def _combine(
    weighted,
    maxima,
    totals,
    sinks,
    line,
    line_stride,
    used,
    head,
    in_group,
    HEAD_SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    MEMBERS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    COMBINED: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """The outputs [MEMBERS, PADDED_SIZE] of all `used` splits, the first of which begin at `line`.

    Added up in the same order always, whichever program is the last. Other multiprocessors have written
    what is read here: `.cg` reads it out of the L2 cache, past what this one may have kept.
    """
    split = tl.arange(0, MAX_SPLITS)
    place = line[None, :] + split[:, None] * line_stride
    is_used = (split < used)[:, None] & in_group[None, :]
    # [MAX_SPLITS, MEMBERS]
    highest = tl.load(maxima + place, is_used, float("-inf"), cache_modifier=".cg")
    sums = tl.load(totals + place, is_used, 0.0, cache_modifier=".cg")
    # [MEMBERS]
    above = tl.max(highest, 0)
    if HAS_SINKS:
        sink = tl.load(sinks + head, in_group, float("-inf")).to(tl.float32)
        above = tl.maximum(above, sink)
    above = tl.where(above == float("-inf"), 0.0, above)  # no token at all
    total = tl.sum(sums * tl.exp(highest - above[None, :]), 0)
    if HAS_SINKS:
        total += tl.exp(sink - above)
    element = tl.arange(0, PADDED_SIZE)
    combined = tl.zeros([MEMBERS, PADDED_SIZE], tl.float32)
    for first in range(0, used, COMBINED):
        some = first + tl.arange(0, COMBINED)
        some_place = line[None, :] + some[:, None] * line_stride
        are_used = (some < used)[:, None] & in_group[None, :]
        # [COMBINED, MEMBERS]
        some_highest = tl.load(maxima + some_place, are_used, float("-inf"), cache_modifier=".cg")
        share = tl.exp(some_highest - above[None, :])
        # [COMBINED, MEMBERS, PADDED_SIZE]
        part = tl.load(
            weighted + some_place[:, :, None] * HEAD_SIZE + element[None, None, :],
            are_used[:, :, None] & (element < HEAD_SIZE)[None, None, :],
            0.0,
            cache_modifier=".cg",
        )
        combined += tl.sum(share[:, :, None] * part, 0)
    return combined / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit(
    do_not_specialize=["first_query", "num_rows"],
    do_not_specialize_on_alignment=["query_start_loc", "lengths"],
)
def attend_split(
    query,
    query_start_loc,
    kv_cache,
    slots,
    lengths,
    cos_sin,
    key_scale,
    value_scale,
    sinks,
    weighted,
    maxima,
    totals,
    tickets,
    out,
    scale,
    soft_cap,
    first_query,
    num_rows,
    query_stride,
    query_head_stride,
    slots_stride,
    block_stride,
    head_stride,
    value_offset,
    token_stride,
    out_stride,
    out_head_stride,
    GROUP: tl.constexpr,
    LINES: tl.constexpr,
    MEMBERS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    ROTATED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    COMBINED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDEN: tl.constexpr,
    QUANTIZED: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """`out[q, h] = softmax(cap(scale * query[q, h] . K), sinks[h]) . V` of one query and KV head.

    Each split leaves `m = max s`, `sum exp(s - m)` and `sum exp(s - m) V` of its scores `s`, in fp32. As
    `reference.attend`.
    """
    # KV heads vary fastest: the keys that they read lie beside each other.
    kv_head, split, place = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    asking = first_query + place
    row, behind = asking, 0
    if ROWS > 0:
        row, behind = _row_of(asking, query_start_loc, num_rows, ROWS)
        if (row < 0) | (behind < 0):
            return
    # A row's last query sees all of its tokens, the one before it all but the last.
    length = tl.maximum(tl.load(lengths + row) - behind, 0)
    size = tl.cdiv(tl.cdiv(length, SPLIT_TOKENS), MAX_SPLITS) * SPLIT_TOKENS
    used = tl.maximum(tl.cdiv(length, tl.maximum(size, 1)), 1)
    if split >= used:
        return

    # A line is a query head; a product has more lines than a KV head may have query heads.
    line = tl.arange(0, LINES)
    head, in_group = kv_head * GROUP + line, line < GROUP
    element = tl.arange(0, PADDED_SIZE)
    in_head = element < HEAD_SIZE
    asked = query + asking.to(tl.int64) * query_stride + head * query_head_stride
    # [LINES, PADDED_SIZE]
    queries = tl.load(asked[:, None] + element[None, :], in_group[:, None] & in_head[None, :], 0.0)
    if ROTATED > 0:
        half: tl.constexpr = ROTATED // 2
        turned = element < tl.where(length > 0, ROTATED, 0)
        partner = tl.where(element < half, element + half, element - half)
        angle = cos_sin + element % half
        # [PADDED_SIZE]
        cosine = tl.load(angle + (length - 1) * ROTATED, turned, 1.0)
        sine = tl.load(angle + (length - 1) * ROTATED + half, turned, 0.0)
        # [LINES, PADDED_SIZE]
        partners = tl.load(
            asked[:, None] + partner[None, :], in_group[:, None] & turned[None, :], 0.0
        )
        queries = _rotate(
            queries, partners, cosine[None, :], sine[None, :], element[None, :], ROTATED
        )
    operand: tl.constexpr = tl.float32 if WIDEN else query.dtype.element_ty
    queries = queries.to(operand)
    if QUANTIZED:
        scale = scale * tl.load(key_scale)

    entries = slots + row.to(tl.int64) * slots_stride
    heads = kv_cache + kv_head.to(tl.int64) * head_stride
    largest = tl.full([LINES], float("-inf"), tl.float32)
    total = tl.zeros([LINES], tl.float32)
    sums = tl.zeros([LINES, PADDED_SIZE], tl.float32)
    last = tl.minimum((split + 1) * size, length)
    for first in tl.range(split * size, last, TOKENS):
        entry = first + tl.arange(0, TOKENS)
        visible = entry < last
        # [TOKENS]
        slot = tl.load(entries + entry, visible, 0)
        source = (slot // BLOCK_SIZE).to(tl.int64) * block_stride
        source += (slot % BLOCK_SIZE) * token_stride
        # [PADDED_SIZE, TOKENS]
        seen = visible[None, :] & in_head[:, None]
        keys = tl.load(heads + source[None, :] + element[:, None], seen, 0.0)
        # [TOKENS, PADDED_SIZE]
        values = tl.load(
            heads + value_offset + source[:, None] + element[None, :],
            visible[:, None] & in_head[None, :],
            0.0,
        )
        if ROTATED > 0:
            # [PADDED_SIZE, TOKENS]
            seen = visible[None, :] & turned[:, None]
            others = tl.load(heads + source[None, :] + partner[:, None], seen, 0.0)
            angles = angle[:, None] + entry[None, :] * ROTATED
            cosines = tl.load(angles, seen, 1.0)
            sines = tl.load(angles + half, seen, 0.0)
            keys = _rotate(keys, others, cosines, sines, element[:, None], ROTATED)
        # [LINES, TOKENS]
        scores = tl.dot(queries, keys.to(operand), input_precision="ieee") * scale
        if CAPPED:
            # tanh(x) = 1 - 2 / (exp(2 x) + 1), which overflows to 1.
            scores = soft_cap * (1.0 - 2.0 / (tl.exp(scores * (2.0 / soft_cap)) + 1.0))
        scores = tl.where(visible[None, :], scores, float("-inf"))
        above = tl.maximum(largest, tl.max(scores, 1))
        shrunk = tl.exp(largest - above)
        weights = tl.exp(scores - above[:, None])
        total = total * shrunk + tl.sum(weights, 1)
        product = tl.dot(weights.to(operand), values.to(operand), input_precision="ieee")
        sums = sums * shrunk[:, None] + product
        largest = above

    num_heads = tl.num_programs(0) * GROUP
    first_line = place * tl.num_programs(1) * num_heads
    left = first_line + split * num_heads + head
    # [LINES]
    tl.store(maxima + left, largest, in_group)
    tl.store(totals + left, total, in_group)
    # [LINES, PADDED_SIZE]
    tl.store(
        weighted + left[:, None] * HEAD_SIZE + element[None, :],
        sums,
        in_group[:, None] & in_head[None, :],
    )
    # One thread takes the ticket for all of the program. The barrier puts the others' stores before it, and
    # releasing and acquiring on the whole GPU puts them before whatever the last program reads: it has seen
    # every other program's ticket.
    tl.debug_barrier()
    ticket = tickets + place * tl.num_programs(0) + kv_head
    if tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == used - 1:
        member = tl.arange(0, MEMBERS)
        member_head, is_member = kv_head * GROUP + member, member < GROUP
        combined = _combine(
            weighted,
            maxima,
            totals,
            sinks,
            first_line + member_head,
            num_heads,
            used,
            member_head,
            is_member,
            HEAD_SIZE,
            PADDED_SIZE,
            MEMBERS,
            MAX_SPLITS,
            COMBINED,
            HAS_SINKS,
        )
        if QUANTIZED:
            combined *= tl.load(value_scale)
        target = out + asking.to(tl.int64) * out_stride + member_head * out_head_stride
        # [MEMBERS, PADDED_SIZE]
        tl.store(
            target[:, None] + element[None, :], combined, is_member[:, None] & in_head[None, :]
        )
        tl.store(ticket, 0)  # for the next launch: a CUDA graph resets nothing

"""The method from its definition to numbers, with no paging of the work and no batching."""

import torch

from tests.oracle.model import attended_positions, query_chunks
from vllm_tokenselect.kernels.rotate.rotation import Rotation
from vllm_tokenselect.method.settings import Method

CONFIG = Method(top_k=24, n_init=4, n_local=16, query_chunk=32, tail_queries=3)
BLOCK_SIZE, HEAD_SIZE = 16, 32
SCALE = HEAD_SIZE**-0.5


# Angle of each pair of elements, half of the rotated part apart, for one position.
FREQUENCIES = torch.tensor([1.0, 0.5, 0.21, 0.08, 0.03, 0.011, 0.004, 0.002, 0.0009, 0.0001])


def turned(vectors, positions):
    """RoPE by complex numbers: vectors [n, H, D] at positions [n]; the last elements stay."""
    half = len(FREQUENCIES)
    pairs = torch.complex(vectors[..., :half], vectors[..., half : 2 * half])
    angles = torch.outer(torch.as_tensor(positions).float(), FREQUENCIES)[:, None]
    pairs = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([pairs.real, pairs.imag, vectors[..., 2 * half :]], dim=-1)


def rotation():
    """What a layer with this RoPE rotates by where positions are reassigned."""
    angles = torch.outer(torch.arange(CONFIG.max_attended).float(), FREQUENCIES)
    table = torch.cat([angles.cos(), angles.sin()], dim=1)
    return Rotation.from_table(table, CONFIG.max_attended, CONFIG.n_local)


def best(votes, top_k):
    """Indices of the highest votes, ascending; of those alike in 16 bits the first."""
    keys = (votes.view(torch.int32) >> 16).tolist()
    return sorted(sorted(range(len(keys)), key=lambda i: (-keys[i], i))[:top_k])


def defined_attention(
    queries, keys, values, position, chunk, reassigned=False, sinks=None, soft_cap=0.0
):
    """Output of the query at a position of a chunk.

    queries [n, Hq, D], the chunk's; keys, values [T, Hkv, D]; not rotated yet if positions are reassigned.
    Votes know neither sinks [Hq] nor the soft cap of the logits.
    """

    def asking(mean):
        return turned(mean[None], [CONFIG.n_local])[0] if reassigned else mean

    attended, _, _ = attended_positions(
        queries, keys.transpose(0, 1), chunk, SCALE, CONFIG, None, asking
    )
    index = attended[attended <= position]
    query = queries[position - chunk.start]
    group = len(query) // keys.shape[1]
    seen, values = (x[index].repeat_interleave(group, dim=1) for x in (keys, values))
    if reassigned:
        seen = turned(seen, range(len(index)))
        query = turned(query[None], [len(index) - 1])[0]
    logits = torch.einsum("hd,nhd->hn", query, seen) * SCALE
    if soft_cap:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    weights = logits.exp()
    total = weights.sum(-1, keepdim=True)
    weights = weights / (total if sinks is None else total + sinks.float().exp()[:, None])
    return torch.einsum("hn,nhd->hd", weights, values)


def paged_step(requests, num_heads, num_kv_heads, dtype, seed=0):
    """Random keys and values of (first, end, prompt) requests in shuffled pages."""
    generator = torch.Generator().manual_seed(seed)
    num_blocks = [-(-end // BLOCK_SIZE) for _, end, _ in requests]
    kv_cache = torch.randn(
        sum(num_blocks) + 1, num_kv_heads, 2, BLOCK_SIZE, HEAD_SIZE, generator=generator
    ).to(dtype)
    shuffled = (torch.randperm(sum(num_blocks), generator=generator) + 1).to(torch.int32)
    block_table = torch.zeros(len(requests), max(num_blocks), dtype=torch.int32)
    for row, blocks in enumerate(shuffled.split(num_blocks)):
        block_table[row, : len(blocks)] = blocks
    num_queries = sum(end - first for first, end, _ in requests)
    query = torch.randn(num_queries, num_heads, HEAD_SIZE, generator=generator).to(dtype)
    return query, kv_cache, block_table


def expected_attention(
    requests, query, kv_cache, block_table, reassigned=False, sinks=None, soft_cap=0.0
):
    outputs, first_query = [], 0
    for row, (first, end, prompt) in enumerate(requests):
        pages = kv_cache[block_table[row].long()].float()  # [W, Hkv, 2, block, D]
        keys, values = (
            pages[:, :, i].transpose(1, 2).reshape(-1, *pages.shape[1:2], HEAD_SIZE) for i in (0, 1)
        )
        for chunk in query_chunks(first, end, prompt, CONFIG):
            offset = first_query - first
            queries = query[offset + chunk.start : offset + chunk.stop].float()
            outputs += [
                defined_attention(
                    queries, keys, values, position, chunk, reassigned, sinks, soft_cap
                )
                for position in chunk
            ]
        first_query += end - first
    return torch.stack(outputs)


REQUESTS = {
    "prefill": [(0, 200, 200)],
    "chunked": [(64, 150, 300), (128, 160, 163)],
    "decode": [(150, 151, 100), (30, 31, 20), (199, 200, 64), (45, 46, 45)],
    "mixed": [(96, 200, 190), (99, 100, 50), (0, 40, 40), (32, 64, 500)],
}

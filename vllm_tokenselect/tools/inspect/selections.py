"""Ways to select the tokens that a chunk of queries attends to, all with the same budget.

The method's own way is the readable definition (`kernels/*/reference.py`) over the plan that a server
makes. The others show what it is worth: they spend the same budget on a longer local window, at random, or
on the tokens that full attention weighs most, which cannot be known without computing it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm_tokenselect.kernels.block_table.reference import order_keys
from vllm_tokenselect.kernels.vote.reference import soft_vote
from vllm_tokenselect.method.plan import SelectionPlan
from vllm_tokenselect.method.requests import BatchRequests
from vllm_tokenselect.method.settings import Method

TOKENSELECT, SINK_LOCAL, RANDOM, ORACLE = "tokenselect", "sink + local", "random", "oracle"


@dataclass(frozen=True)
class Chunk:
    """Queries [start, end) that attend to the same tokens before them.

    Attributes:
        candidates: positions to select from, more than `top_k`; None if the queries attend to everything.
        top_k: number of positions to select.
        follows: whether it is a generated token that selects: in a layer that is no anchor it attends to
            what the anchor below has selected.
    """

    start: int
    end: int
    candidates: range | None
    top_k: int
    follows: bool = False


def chunks_of(method: Method, num_tokens: int, prompt_len: int) -> list[Chunk]:
    """The chunks of a sequence whose first `prompt_len` tokens are a prompt, as the server cuts it."""
    seat, owner = np.array([0], np.int32), np.array([1], np.int32)
    request = BatchRequests(
        seat, owner, np.array([prompt_len], np.int32), np.array([method.top_k], np.int32)
    )
    plan = SelectionPlan.build(
        np.array([0, num_tokens], np.int32), np.array([num_tokens], np.int32), request, method
    )
    return [
        Chunk(
            int(plan.chunk_start[row]),
            int(plan.chunk_end[row]),
            None if plan.dense[row] else range(method.n_init, int(plan.candidate_end[row])),
            int(plan.top_k[row]),
            bool(plan.follows[row]),
        )
        for row in range(plan.num_rows)
    ]


Select = Callable[[Chunk, torch.Tensor, torch.Tensor, float], torch.Tensor]
"""Called with a chunk that selects, its n queries [Hq, n, D], all keys [Hkv, T, D] and the scale of q . k.
Returns the selected positions, int64 [top_k] or fewer, ascending."""


def by_vote(chunk: Chunk, queries: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """The method's selection."""
    mean = queries.mean(dim=1, keepdim=True, dtype=torch.float32)
    return by_votes([chunk], mean, keys, scale)[0]


def by_votes(
    chunks: Sequence[Chunk], asking: torch.Tensor, keys: torch.Tensor, scale: float
) -> torch.Tensor:
    """The method's selections of several chunks with one `top_k`: int64 [n, top_k], ascending.

    Args:
        chunks: n chunks that select.
        asking: [Hq, n, D], the mean query of each.
    """
    first = min(_candidates(chunk).start for chunk in chunks)
    stops = torch.tensor([_candidates(chunk).stop for chunk in chunks], device=keys.device)
    last = int(stops.max())
    logits = scores(asking.float(), keys[:, first:last], scale).transpose(0, 1)  # [n, Hq, N]
    behind = torch.arange(first, last, device=keys.device) >= stops[:, None]
    votes = soft_vote(logits.masked_fill(behind[:, None], -torch.inf))
    return best(votes, chunks[0].top_k) + first


def by_attention(
    chunk: Chunk, queries: torch.Tensor, keys: torch.Tensor, scale: float
) -> torch.Tensor:
    """The tokens with the most of full attention, summed over heads and queries."""
    positions = spread(chunk)
    asking = queries[:, positions - chunk.start].float()
    shares = causal_scores(asking, positions, keys, scale).softmax(dim=-1)
    candidates = _candidates(chunk)
    votes = shares.sum(dim=(0, 1))[candidates.start : candidates.stop]
    return best(votes, chunk.top_k) + candidates.start


def at_random(
    chunk: Chunk, queries: torch.Tensor, keys: torch.Tensor, scale: float
) -> torch.Tensor:
    """Random candidates; a chunk always gets the same ones."""
    candidates = _candidates(chunk)
    generator = torch.Generator().manual_seed(chunk.start)
    chosen = torch.randperm(len(candidates), generator=generator)[: chunk.top_k]
    return (chosen.sort().values + candidates.start).to(keys.device)


def by_distance(
    chunk: Chunk, queries: torch.Tensor, keys: torch.Tensor, scale: float
) -> torch.Tensor:
    """The last candidates: a local window that is longer by the budget."""
    end = _candidates(chunk).stop
    return torch.arange(end - chunk.top_k, end, device=keys.device)


WAYS: dict[str, Select] = {
    TOKENSELECT: by_vote,
    SINK_LOCAL: by_distance,
    RANDOM: at_random,
    ORACLE: by_attention,
}


def causal_scores(
    asking: torch.Tensor, positions: torch.Tensor, keys: torch.Tensor, scale: float
) -> torch.Tensor:
    """Scores fp32 [Hq, n, T] of queries fp32 [Hq, n, D] at positions [n]; -inf for what is not seen."""
    seen = scores(asking, keys, scale)
    unseen = torch.arange(keys.shape[1], device=keys.device) > positions[:, None].to(keys.device)
    return seen.masked_fill_(unseen, -torch.inf)


def attended_positions(chunk: Chunk, selected: torch.Tensor, method: Method) -> torch.Tensor:
    """Positions of sink, selection and local window of a chunk that selects: int64, ascending."""
    sink = torch.arange(method.n_init, device=selected.device)
    local = torch.arange(_candidates(chunk).stop, chunk.end, device=selected.device)
    return torch.cat([sink, selected, local])


def spread(chunk: Chunk, most: int = 32) -> torch.Tensor:
    """Positions of at most `most` queries of a chunk, evenly spread, to measure a long chunk by."""
    count = min(most, chunk.end - chunk.start)
    return torch.linspace(chunk.start, chunk.end - 1, count).round().long()


def scores(asking: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """q . k of queries fp32 [Hq, n, D] and keys [Hkv, m, D]: fp32 [Hq, n, m]."""
    heads, count, size = asking.shape
    grouped = asking.reshape(len(keys), -1, size)  # by the KV head that they read
    return (grouped @ keys.float().transpose(1, 2) * scale).view(heads, count, -1)


def best(votes: torch.Tensor, top_k: int) -> torch.Tensor:
    """Indices of the highest votes [..., N], of equal ones the first: int64 [..., top_k], ascending."""
    count = votes.shape[-1]
    # The vote in the high bits, the number of later ones in the low bits: no two are equal, so that topk
    # decides as a stable sort would.
    later = torch.arange(count - 1, -1, -1, device=votes.device)
    ranks = (order_keys(votes).long() << 32) + later
    chosen = ranks.topk(min(top_k, count), dim=-1, sorted=False).indices
    return chosen.sort(dim=-1).values


def _candidates(chunk: Chunk) -> range:
    assert chunk.candidates is not None, "the chunk attends to everything"
    return chunk.candidates

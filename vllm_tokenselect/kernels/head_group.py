"""The heads of a layer that are divided among processes, where all of them vote together.

Which implementation talks to the other processes is the engine's affair; the operations ask for two
things only.
"""

from __future__ import annotations

from typing import Protocol

import torch


class HeadGroup(Protocol):
    """The processes of one tensor-parallel group, each with an equal share of a layer's query heads.

    All of them make the same calls in the same order: what they call for depends on the plan of the
    step and on what `gather_heads` and `sum_votes` returned, which is the same for all.

    Attributes:
        size: processes.
        num_kv_heads: of the whole layer; a process may share its KV head with others.
    """

    @property
    def size(self) -> int: ...

    @property
    def num_kv_heads(self) -> int: ...

    def gather_heads(self, query: torch.Tensor) -> torch.Tensor:
        """Queries of the layer's heads in their order: [R, Hq, D] of each process -> [R, all Hq, D]."""

    def sum_votes(self, votes: torch.Tensor) -> torch.Tensor:
        """Votes fp32 [R, N] of all heads, the same bits in every process; may overwrite `votes`."""


def num_voting_heads(num_heads: int, heads: HeadGroup | None) -> int:
    """Query heads of a layer that vote together, of which a process has `num_heads`.

    Args:
        heads: the processes that vote together; None where a process votes for itself.
    """
    return num_heads if heads is None else num_heads * heads.size

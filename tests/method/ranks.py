"""The heads of a layer in several processes, which talk to each other by gloo."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


class GlooHeads:
    """A `HeadGroup` of all processes, which writes down what it was called for."""

    def __init__(self, num_kv_heads: int) -> None:
        self.size, self.num_kv_heads = dist.get_world_size(), num_kv_heads
        self.calls: list[str] = []

    def gather_heads(self, query: torch.Tensor) -> torch.Tensor:
        self.calls.append("gather")
        gathered = [torch.empty_like(query) for _ in range(self.size)]
        dist.all_gather(gathered, query.contiguous())
        return torch.cat(gathered, dim=1)

    def sum_votes(self, votes: torch.Tensor) -> torch.Tensor:
        self.calls.append("sum")
        dist.all_reduce(votes)
        return votes


def on_ranks(folder: Path, job: Callable[..., None], *args: object, ranks: int = 2) -> None:
    """Run `job(rank, *args)` in so many processes of one gloo group; raises what one of them raises."""
    # Two processes on a small machine: a thread each is enough, and idle ones must not spin.
    os.environ |= {"OMP_WAIT_POLICY": "passive"}
    mp.spawn(_run, (ranks, str(folder / "rendezvous"), job, *args), nprocs=ranks)


def _run(rank: int, ranks: int, file: str, job: Callable[..., None], *args: object) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=ranks)
    try:
        job(rank, *args)
    finally:
        dist.destroy_process_group()

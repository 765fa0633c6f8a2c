"""Which request owns which seat: the one place where per-request state is keyed.

Everything that follows a request through continuous batching is an array with one entry per seat.
A request owns its seat from its first step until it ends or is preempted. Each time a seat is given
away, its owner is a new number: state that was kept for another owner, also for the same request
before it was preempted, is known by that and never read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]

NO_SEAT = -1
NO_OWNER = 0


class RequestTable:
    """Stable seats for running requests, with what a plan needs to know of each.

    Args:
        capacity: number of seats: `max_num_seqs`.

    Attributes:
        prompt_lens: int32 [capacity], tokens of the prompt of each seat's request.
        top_k: int32 [capacity], tokens that its chunks select.
        owners: int32 [capacity], which of all owners so far a seat has; 0 while it is free.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.prompt_lens: Int32 = np.zeros(capacity, dtype=np.int32)
        self.top_k: Int32 = np.zeros(capacity, dtype=np.int32)
        self.owners: Int32 = np.full(capacity, NO_OWNER, dtype=np.int32)
        self._num_owners = 0
        self._seats: dict[str, int] = {}
        self._free = list(range(capacity - 1, -1, -1))

    def __len__(self) -> int:
        return len(self._seats)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._seats

    def add(self, request_id: str, prompt_len: int, top_k: int, seat: int | None = None) -> int:
        """Give the request a fresh seat and return it.

        Args:
            request_id: the request; one that already has a seat is replaced.
            prompt_len: tokens of its prompt.
            top_k: tokens that its chunks select; `FULL_ATTENTION` for the whole context.
            seat: the seat to use where the model runner keeps stable rows itself (Model Runner V2).

        Raises:
            RuntimeError: when every seat is taken, or the given one is.
        """
        self.remove(request_id)
        if seat is None:
            if not self._free:
                raise RuntimeError(f"no free seat for request {request_id}: {self.capacity} in use")
            seat = self._free.pop()
        elif seat in self._free:
            self._free.remove(seat)
        else:
            raise RuntimeError(f"seat {seat} for request {request_id} is taken or out of range")
        self._seats[request_id] = seat
        self.prompt_lens[seat] = prompt_len
        self.top_k[seat] = top_k
        self._num_owners = self._num_owners % np.iinfo(np.int32).max + 1
        self.owners[seat] = self._num_owners
        return seat

    def remove(self, request_id: str) -> None:
        """Free the request's seat; a request without one is left alone."""
        seat = self._seats.pop(request_id, None)
        if seat is not None:
            self.owners[seat] = NO_OWNER
            self._free.append(seat)

    def seats_of(self, request_ids: Iterable[str]) -> Int32:
        """Seats of the requests, int32 [S].

        Raises:
            KeyError: for a request that was never added.
        """
        return np.fromiter((self._seats[request_id] for request_id in request_ids), np.int32)


@dataclass(frozen=True)
class StepRequests:
    """The requests of the step whose attention metadata is being built."""

    table: RequestTable
    seats: Int32


@dataclass(frozen=True)
class BatchRequests:
    """What a plan needs to know of the requests of a step, in order of the batch.

    Attributes:
        seats: int32 [S]; -1 for padding and for dummy steps, which belong to no request.
        owners: int32 [S]; 0 where there is no seat.
        prompt_lens: int32 [S].
        top_k: int32 [S].
    """

    seats: Int32
    owners: Int32
    prompt_lens: Int32
    top_k: Int32

    @classmethod
    def without_seats(cls, prompt_lens: Int32, top_k: int) -> BatchRequests:
        """Prompts of no request, for which nothing is kept."""
        size = len(prompt_lens)
        return cls(
            seats=np.full(size, NO_SEAT, np.int32),
            owners=np.full(size, NO_OWNER, np.int32),
            prompt_lens=prompt_lens.copy(),
            top_k=np.full(size, top_k, np.int32),
        )

    @classmethod
    def of_step(
        cls, requests: StepRequests | None, seq_lens: Int32, default_top_k: int
    ) -> BatchRequests:
        """The requests of a step. A dummy request is a prompt without generated tokens.

        Args:
            requests: of the step; None where all of it is dummy.
            seq_lens: int32 [S], the contexts' lengths.
            default_top_k: of dummy requests.
        """
        size = len(seq_lens)
        if requests is not None and len(requests.seats) >= size:
            seats, table = requests.seats[:size].astype(np.int32, copy=False), requests.table
            owners = table.owners[seats]
            if owners.all():  # neither padding nor dummies
                return cls(seats, owners, table.prompt_lens[seats], table.top_k[seats])
        batch = cls.without_seats(seq_lens, default_top_k)
        if requests is not None:
            seats, table = requests.seats[:size], requests.table
            known = slice(len(seats))
            batch.owners[known] = table.owners[seats]
            # Dummy steps of Model Runner V2 name rows that nobody owns.
            batch.seats[known] = np.where(table.owners[seats] == NO_OWNER, NO_SEAT, seats)
            batch.prompt_lens[known] = table.prompt_lens[seats]
            batch.top_k[known] = table.top_k[seats]
        return batch

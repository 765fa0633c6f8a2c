"""Request seats: one owner each, a new number for every owner, none lost."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vllm_tokenselect.method.requests import RequestTable

CAPACITY, TOP_K = 4, 64
request_ids = st.sampled_from([f"request-{index}" for index in range(CAPACITY + 2)])


class Seats(RuleBasedStateMachine):
    """Requests come, come back, are preempted and end in any order, beside a model of it.

    Each step of a request writes into its seat who it is, as a layer's state does, and reads what is
    there first: it is its own or nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.table = RequestTable(CAPACITY)
        self.prompt_lens: dict[str, int] = {}
        self.occupancy = 0
        self.occupancies: dict[str, int] = {}
        self.state_owner = np.zeros(CAPACITY, np.int32)
        self.state_occupancy = np.zeros(CAPACITY, np.int64)

    def added(self, request_id: str, prompt_len: int) -> None:
        self.prompt_lens[request_id] = prompt_len
        self.occupancy += 1
        self.occupancies[request_id] = self.occupancy

    @rule(request_id=request_ids, prompt_len=st.integers(1, 10**6))
    def add(self, request_id: str, prompt_len: int) -> None:
        if request_id not in self.prompt_lens and len(self.prompt_lens) == CAPACITY:
            with pytest.raises(RuntimeError, match="no free seat"):
                self.table.add(request_id, prompt_len, TOP_K)
            return
        self.table.add(request_id, prompt_len, prompt_len % TOP_K)
        self.added(request_id, prompt_len)

    @rule(request_id=request_ids, prompt_len=st.integers(1, 10**6), seat=st.integers(0, CAPACITY))
    def add_in_seat(self, request_id: str, prompt_len: int, seat: int) -> None:
        others = [other for other in self.prompt_lens if other != request_id]
        if seat == CAPACITY or seat in self.table.seats_of(others):
            self.prompt_lens.pop(request_id, None)
            with pytest.raises(RuntimeError, match=f"seat {seat} .* taken or out of range"):
                self.table.add(request_id, prompt_len, TOP_K, seat=seat)
            return
        assert self.table.add(request_id, prompt_len, prompt_len % TOP_K, seat=seat) == seat
        self.added(request_id, prompt_len)

    @rule(request_id=request_ids)
    def preempt_or_end(self, request_id: str) -> None:
        self.table.remove(request_id)
        self.prompt_lens.pop(request_id, None)

    @precondition(lambda self: self.prompt_lens)
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        batch = data.draw(st.lists(st.sampled_from(sorted(self.prompt_lens)), unique=True))
        seats = self.table.seats_of(batch)
        for request_id, seat, owner in zip(batch, seats, self.table.owners[seats], strict=True):
            assert owner != 0, "a running request owns its seat"
            if self.state_owner[seat] == owner:
                assert self.state_occupancy[seat] == self.occupancies[request_id]
            self.state_owner[seat] = owner
            self.state_occupancy[seat] = self.occupancies[request_id]

    @invariant()
    def every_seat_has_one_owner_and_its_prompt_length(self) -> None:
        owners = sorted(self.prompt_lens)
        seats = self.table.seats_of(owners)
        assert len(set(seats.tolist())) == len(owners) == len(self.table)
        assert all(0 <= seat < CAPACITY for seat in seats)
        expected = [self.prompt_lens[owner] for owner in owners]
        np.testing.assert_array_equal(self.table.prompt_lens[seats], expected)
        np.testing.assert_array_equal(self.table.top_k[seats], [n % TOP_K for n in expected])

    def teardown(self) -> None:
        for request_id in sorted(self.prompt_lens):
            self.table.remove(request_id)
        assert sorted(
            self.table.add(f"new-{index}", 1, TOP_K) for index in range(CAPACITY)
        ) == list(range(CAPACITY)), "a seat leaked"


Seats.TestCase.settings = settings(deadline=None)
test_seats = Seats.TestCase


def test_owners_stay_unique_to_their_seat_when_their_numbers_start_again():
    table = RequestTable(1)
    table._num_owners = np.iinfo(np.int32).max - 1
    owners = []
    for _ in range(3):
        table.add("request", 1, TOP_K)
        owners.append(int(table.owners[0]))
    assert owners == [np.iinfo(np.int32).max, 1, 2]


def test_a_request_that_was_never_added_has_no_seat():
    with pytest.raises(KeyError):
        RequestTable(CAPACITY).seats_of(["unknown"])

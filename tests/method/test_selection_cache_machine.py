"""Whatever comes, goes, is preempted and comes back, every token attends to what the definition says."""

from functools import cache

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.method.serving import CAPACITY, METHOD, TOKENS, Request, Server
from vllm_tokenselect.method.settings import FULL_ATTENTION

NAMES = "abcdefgh"


@cache
def request_of(name: str) -> Request:
    """Prompts from short to long, one with a smaller budget, one with full attention."""
    index = NAMES.index(name)
    top_k = {5: 7, 6: FULL_ATTENTION}.get(index, METHOD.top_k)
    return Request(name, 20 + 15 * index, top_k)


class Serving(RuleBasedStateMachine):
    """`Server.step` compares every output with the definition's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.server = Server()
        self.running: list[str] = []

    @precondition(lambda self: len(self.running) < CAPACITY)
    @rule(data=st.data())
    def start(self, data: st.DataObject) -> None:
        """A request comes, or comes back after a preemption: it starts again at its first token."""
        name = data.draw(st.sampled_from([n for n in NAMES if n not in self.running]))
        self.server.start(request_of(name))
        self.running.append(name)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def stop(self, data: st.DataObject) -> None:
        """A request ends, is aborted or preempted."""
        name = data.draw(st.sampled_from(self.running))
        self.server.stop(request_of(name))
        self.running.remove(name)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), sizes=st.lists(st.integers(0, 40), min_size=CAPACITY, max_size=CAPACITY))
    def step(self, data: st.DataObject, sizes: list[int]) -> None:
        """Some requests advance: by whole chunks of their prompt, then by any number of tokens."""
        work = []
        for name, size in zip(data.draw(st.permutations(self.running)), sizes, strict=False):
            request = request_of(name)
            tail = METHOD.tail_start(request.prompt)
            if request.done < tail:
                chunked = (request.done // METHOD.query_chunk + 1) * METHOD.query_chunk
                size = min(chunked, tail) - request.done + (size if chunked > tail else 0)
            size = min(size, TOKENS - request.done)
            if size:
                work.append((request, size))
        if work:
            self.server.step(*work)

    @invariant()
    def no_seat_is_lost(self) -> None:
        assert len(self.server.table) == len(self.running)

    def teardown(self) -> None:
        for name in self.running:
            self.server.stop(request_of(name))
        assert len(self.server.table) == 0


# Each step computes a layer: a tenth of the usual number of them, but for `make endurance`.
endurance = settings.get_current_profile_name() == "endurance"
Serving.TestCase.settings = settings(
    deadline=None,
    max_examples=1000 if endurance else 20,
    stateful_step_count=100 if endurance else 25,
)
test_serving = Serving.TestCase

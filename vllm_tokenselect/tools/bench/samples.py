"""Samples: what is kept of each request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from vllm_tokenselect.tools.common.timing import TimedAnswer


@dataclass(frozen=True)
class Sample:
    """One request.

    Attributes:
        contender: name of the server.
        prompt_tokens: of the prompt.
        rate: requests a second among which it came; None for one that was sent alone.
        round: which of the prompts of this length, or which run at this rate.
        generation: which generation from its prompt; from 1 on the prompt comes from the prefix cache.
        at_s: seconds from the start of the run at the rate to its arrival.
        waited: whether it had to wait for others, because too many requests were open.
        worker_rss_mib: peak memory of the server's largest process during the request, or during the run
            at the rate; None if unknown.
        device_mib: GPU memory of the server after the request; None if unknown.
    """

    contender: str
    prompt_tokens: int
    rate: float | None
    round: int
    generation: int
    at_s: float
    waited: bool
    answer: TimedAnswer
    worker_rss_mib: float | None
    device_mib: float | None

    @property
    def is_answered(self) -> bool:
        """Whether it was answered to the end."""
        return self.answer.error is None


@dataclass(frozen=True)
class Selected:
    """What a server selected for all requests of a length, or at a rate.

    Attributes:
        counts: tokens "attended" to and "in_context", and rows by their kind, summed over layers.
        reused: share, 0 to 1, of generated tokens' selections that were reused; None if unknown.
    """

    contender: str
    prompt_tokens: int
    rate: float | None
    counts: Mapping[str, float]
    reused: float | None


@dataclass
class Measured:
    """All that was measured so far."""

    samples: list[Sample] = field(default_factory=list)
    selected: list[Selected] = field(default_factory=list)

    @property
    def failures(self) -> list[Sample]:
        """The requests that were not answered to the end."""
        return [sample for sample in self.samples if not sample.is_answered]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

"""What a server selects, read from its `/metrics` before and after it is asked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from vllm_tokenselect.tools.bench.timing import TimedAnswer
from vllm_tokenselect.tools.common.server_facts import ROW_KINDS, selection_counts


class SelectionCounter:
    """The counters of one server.

    Args:
        url: of the server.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._last = selection_counts(url)
        self._layers: int | None = None

    def read(self) -> Mapping[str, float] | None:
        """What came since the last reading; None where the server does not count."""
        before, self._last = self._last, selection_counts(self._url)
        if before is None or self._last is None:
            return None
        return {name: self._last[name] - before[name] for name in self._last if name in before}

    def learn_layers(self, new_prompt: int, answer: TimedAnswer) -> None:
        """Read what one request added, to know how many layers select.

        Every query adds its context once in each of them. Where it does not come out even, others ask the
        server too or the prompt was cached, and the number stays unknown.

        Args:
            new_prompt: tokens of its prompt.
        """
        added = self.read()
        queries = new_prompt + answer.output_tokens - 1  # the last token is never a query
        layers = added["in_context"] / (queries * (queries + 1) // 2) if added else 0.0
        self._layers = int(layers) if layers.is_integer() and layers > 0 else None

    def reused_share(
        self, counts: Mapping[str, float], answers: Iterable[TimedAnswer]
    ) -> float | None:
        """Share, 0 to 1, of the answers' selections that were reused; None where not known."""
        generated = sum(max(answer.output_tokens - 1, 0) for answer in answers)
        if self._layers is None or not generated or not counts.keys() >= set(ROW_KINDS):
            return None
        return counts["reused"] / (self._layers * generated)

"""How many selections a server reuses, by its counters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from vllm_tokenselect.tools.common.server_facts import SelectionCounter
from vllm_tokenselect.tools.common.timing import TimedAnswer


class ReuseCounter(SelectionCounter):
    """The counters of a server, and how many of its layers select.

    Args:
        url: of the server.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._layers: int | None = None

    def learn_layers(self, new_prompt: int, answer: TimedAnswer) -> None:
        """Find out how many layers select, from what one request added to the counters.

        Every query adds its context once in each of these layers. If the sum does not come out even, others
        ask the server too or the prompt was cached, and the number stays unknown.

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
        """Share, 0 to 1, of the answers' selections that were reused; None where not known.

        A layer that follows an anchor makes none.
        """
        generated = sum(max(answer.output_tokens - 1, 0) for answer in answers)
        if self._layers is None or not generated or "reused" not in counts:
            return None
        selections = self._layers * generated - counts.get("shared", 0)
        return counts["reused"] / selections if selections > 0 else None

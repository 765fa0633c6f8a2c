"""What the tasks ask."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TaskPrompt:
    """What is asked, and what must be said.

    Attributes:
        tokens: of the prompt.
        expected: strings that the answer must contain.
        depth: where the first of these stands in the prompt, 0 to 1.
        begun: how the prompt begins the answer.
    """

    tokens: list[int]
    expected: tuple[str, ...]
    depth: float
    begun: str

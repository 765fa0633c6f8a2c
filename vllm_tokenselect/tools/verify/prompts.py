"""Prompts of about any length in tokens, for a server whose tokenizer nobody here has."""

from __future__ import annotations

_PARAGRAPH = (
    "The ferry left the harbor in the morning and crossed the bay in two hours. Its captain wrote the "
    "weather, the cargo and the names of the passengers into the log. On the other side the mail was "
    "taken ashore, the tanks were filled, and the crew had their meal. In the evening the ferry came back "
    "with timber, salt and three sacks of letters, and was made fast at the same pier."
)
SHORT = 2  # paragraphs


def paragraphs(count: int) -> str:
    """So many paragraphs of almost the same number of tokens each."""
    return "\n\n".join(f"Day {day}. {_PARAGRAPH}" for day in range(1, count + 1))


def as_long_as(tokens: int, short_tokens: int) -> str:
    """A text of about so many tokens, hardly ever more.

    Args:
        short_tokens: that a server counts in `SHORT` paragraphs.
    """
    each = short_tokens / SHORT + 4  # large numbers of days take more
    return paragraphs(max(int(tokens / each), 1))

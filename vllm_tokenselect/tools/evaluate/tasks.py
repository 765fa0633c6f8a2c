"""The tasks by name: how each makes a prompt and scores an answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from vllm_tokenselect.tools.common.hidden import (
    ANSWER_TOKENS,
    NUMBER_DIGITS,
    HiddenPrompt,
    is_right,
    needle_prompts,
    number_string_prompt,
    passkey_prompt,
)
from vllm_tokenselect.tools.evaluate import ruler
from vllm_tokenselect.tools.evaluate.prompts import TaskPrompt

STEPS, REPLAY = "perplexity", "perplexity_decode"
_NEEDLES = 8  # questions about one haystack


class UnknownTask(ValueError):
    """There is no such task. The message lists the tasks."""


@dataclass(frozen=True)
class Task:
    """A task whose answers are text.

    Attributes:
        make: makes a prompt from (tokenizer, most tokens, depth, number). The depth is None for tasks that
            do not choose it.
        score: 0 to 1, from what was said and what was expected.
        max_tokens: of the answer.
        about: a few words about the task, and its source.
        chooses_depth: whether `make` takes a depth.
    """

    name: str
    make: Callable[[Any, int, float | None, int], TaskPrompt]
    score: Callable[[str, Sequence[str]], float]
    max_tokens: int
    about: str
    chooses_depth: bool = False


def _ruler(name: str, make: ruler.Make, least: int, max_tokens: int, about: str) -> Task:
    def prompt(tokenizer: Any, tokens: int, depth: float | None, number: int) -> TaskPrompt:
        return ruler.ruler_prompt(make, tokenizer, tokens, number, least)

    return Task(name, prompt, ruler.share_said, max_tokens, about)


def _hidden(
    name: str, make: Callable[[Any, int, float, int], HiddenPrompt], max_tokens: int, about: str
) -> Task:
    def prompt(tokenizer: Any, tokens: int, depth: float | None, number: int) -> TaskPrompt:
        assert depth is not None
        return _of_hidden(make(tokenizer, tokens, depth, number))

    return Task(name, prompt, _first_number, max_tokens, about, chooses_depth=True)


def _fact(tokenizer: Any, tokens: int, depth: float | None, number: int) -> TaskPrompt:
    haystack, question = divmod(number, _NEEDLES)
    return _of_hidden(needle_prompts(tokenizer, tokens, haystack, _NEEDLES)[question])


def _of_hidden(made: HiddenPrompt) -> TaskPrompt:
    return TaskPrompt(made.tokens, (made.expected,), made.depth, made.begun)


def _first_number(said: str, expected: Sequence[str]) -> float:
    return float(is_right(said, expected[0]))


# The numbers of tokens for RULER's answers are RULER's own.
_NOISE = partial(ruler.needles, "repeat")
TASKS = {
    task.name: task
    for task in (
        _ruler("niah_single_1", _NOISE(), 4, 128, "one needle in noise (RULER)"),
        _ruler("niah_multikey_2", ruler.needles("needle"), 4, 128, "one needle of many (RULER)"),
        _ruler(
            "niah_multikey_3",
            ruler.needles("needle", "uuids", "uuids"),
            4,
            128,
            "one needle of many, keys and values are UUIDs (RULER)",
        ),
        _ruler(
            "niah_multivalue_noise",
            _NOISE(values=4),
            8,
            128,
            "a needle with four values in noise (RULER has essays)",
        ),
        _ruler(
            "niah_multiquery_noise",
            _NOISE(queries=4),
            8,
            128,
            "four needles in noise, all asked for (RULER has essays)",
        ),
        _ruler("vt", ruler.variable_tracking, 8, 30, "variables that have a value (RULER)"),
        _ruler("cwe", ruler.common_words, 20, 120, "the ten most common words (RULER)"),
        _ruler("fwe", ruler.frequent_words, 60, 50, "the three most frequent words (RULER)"),
        _hidden("passkey", passkey_prompt, ANSWER_TOKENS, "five digits in noise (InfiniteBench)"),
        _hidden(
            "number_string",
            number_string_prompt,
            NUMBER_DIGITS + 2,
            "ten digits with repetitions in noise (InfiniteBench)",
        ),
        Task("facts", _fact, _first_number, ANSWER_TOKENS, "one of eight numbers in real text"),
    )
}
LOSSES = {
    STEPS: "log-probabilities of real text, a request for each token",
    REPLAY: "the same while decoding, a request for each text",
}
DEFAULT = tuple(TASKS)


def known_tasks(names: Iterable[str]) -> list[str]:
    """The names without repetition.

    Raises:
        UnknownTask: naming those that there are not.
    """
    names = list(dict.fromkeys(names))
    allowed = [*TASKS, *LOSSES]
    unknown = [name for name in names if name not in allowed]
    if unknown or not names:
        raise UnknownTask(
            f"there is no task {', '.join(map(repr, unknown)) or 'named'}: "
            f"--tasks takes {', '.join(allowed)}, separated by commas"
        )
    return names

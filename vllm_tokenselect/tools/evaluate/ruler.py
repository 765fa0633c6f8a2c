"""RULER's tasks (Hsieh et al. 2024, arXiv 2404.06654) by the generators of lm-eval, without a download.

lm-eval makes a text of a given number of words, lines or sentences. This module finds how many of them fit
a length in tokens. lm-eval's own search grows a text step by step, which takes minutes at 128K tokens and
never ends if even the shortest text does not fit.

One thing differs from lm-eval: in tasks with several values or several questions the needles stand in the
repeated noise of `niah_single_1`, and the names of these tasks end in `_noise`. lm-eval takes essays there,
which are a download, and splits them into sentences with data of nltk, another download.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import SimpleNamespace
from typing import Any

from vllm_tokenselect.tools.common.text import around, encode
from vllm_tokenselect.tools.evaluate.prompts import TaskPrompt

_MODULES = "lm_eval.tasks.ruler"
_EXAMPLE_LINES = (
    10  # of noise, in the example before a variable is to be tracked: as many as in lm-eval
)
_HOPS = 4


@dataclass(frozen=True)
class RulerText:
    """A text with its question, the answer as it begins, and what must be said."""

    text: str
    begun: str
    expected: tuple[str, ...]


# Makes a text of (units) for prompts of (tokens), from the state of `random`.
Make = Callable[[int, int], RulerText]


def ruler_prompt(make: Make, tokenizer: Any, length: int, seed: int, least: int) -> TaskPrompt:
    """A prompt of a task that fills `length` tokens but for a few percent.

    Args:
        make: makes a text of so many units; the same seed and number make the same text.
        least: the fewest units that a text may have.

    Raises:
        ValueError: when not even those fit.
    """
    units = _units_that_fit(make, tokenizer, length, least)
    while len((prompt := _made(make, tokenizer, length, seed, units)).tokens) > length:
        if units == least:
            raise ValueError(f"{length} tokens cannot hold this task at seed {seed}")
        units = max(least, units - max(1, units // 50))
    return prompt


@cache
def _units_that_fit(make: Make, tokenizer: Any, length: int, least: int) -> int:
    """Units of which a text of one seed fits, and one of 2 % more does not."""
    size = len(_made(make, tokenizer, length, 0, least).tokens)
    if size > length:
        raise ValueError(f"{length} tokens cannot hold this task, which takes {size} at least")
    fits, too_many, units = least, None, 2 * least
    # A unit takes a token at least: a task that has no more units to give ends here.
    while units <= length and (too_many is None or too_many - fits > max(1, fits // 50)):
        if len(_made(make, tokenizer, length, 0, units).tokens) <= length:
            fits = units
        else:
            too_many = units
        units = 2 * units if too_many is None else (fits + too_many) // 2
    return fits


def _made(make: Make, tokenizer: Any, length: int, seed: int, units: int) -> TaskPrompt:
    with _seeded(seed):
        made = make(units, length)
    head, tail = around(tokenizer, "", "", made.begun)
    tokens = [*head, *encode(tokenizer, made.text), *tail]
    depth = made.text.find(made.expected[0]) / len(made.text)
    return TaskPrompt(tokens, made.expected, max(depth, 0.0), made.begun)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """lm-eval draws from the global generators: seed them, and leave them as they were."""
    import numpy as np

    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def share_said(said: str, expected: Sequence[str]) -> float:
    """RULER's score: which share of the answers is in what was said, 0 to 1."""
    common = _generator("common_utils")
    return float(common.string_match_all(common.postprocess_pred([said]), [list(expected)]))


def needles(
    haystack: str, key: str = "words", value: str = "numbers", values: int = 1, queries: int = 1
) -> Make:
    """Needles in `units` lines of a haystack.

    Args:
        haystack: "repeat" for noise, "needle" for needles that are not asked for.
        key: "words" or "uuids".
        value: "numbers" or "uuids".
        values: of each needle.
        queries: needles that are asked for.
    """

    def make(units: int, length: int) -> RulerText:
        generator = _generator("prepare_niah")
        text, answers, asked = generator.generate_input_output(
            units,
            generator.get_haystack(type_haystack=haystack),
            type_haystack=haystack,
            num_needle_k=queries,
            type_needle_k=key,
            num_needle_v=values,
            type_needle_v=value,
            template=_generator("niah_utils").TEMPLATE,
            num_needle_q=queries,
            random_seed=random.randrange(2**31),
        )
        kind, verb = (value[:-1], "is") if values * queries == 1 else (value, "are")
        begun = f"The special magic {kind} for {asked} mentioned in the provided text {verb}"
        return RulerText(text, begun, tuple(answers))

    return make


def variable_tracking(units: int, length: int) -> RulerText:
    """A chain of five variables in `units` lines of noise, after a short example of one."""
    generator = _generator("vt_utils")
    example, found = generator.generate_input_output(_EXAMPLE_LINES, 1, _HOPS, is_icl=True)
    text, variables = generator.generate_input_output(units, 1, _HOPS)
    prefix = generator.CONFIG["variable_tracking"]["answer_prefix"]
    question, begun = _split(text, prefix[: prefix.index("{")])
    return RulerText(f"{example}{' '.join(found)}\n\n{question}", begun, tuple(variables))


def common_words(units: int, length: int) -> RulerText:
    """A numbered list of `units` different words, ten of which appear more often than the others."""
    generator = _generator("cwe_utils")
    generator.RNG.seed(random.randrange(2**31))
    _, text, words = generator.generate_input_output(min(units, len(generator.WORDS)), length)
    question, begun = _split(text, generator.CONFIG["answer_prefix"])
    return RulerText(question, begun, tuple(words))


def frequent_words(units: int, length: int) -> RulerText:
    """About `units` made-up words, their frequencies after Zipf; the three most frequent are asked for."""
    generator = _generator("fwe_utils")
    text, words, _ = generator.generate_input_output(
        length, _no_tokens, num_words=units, vocab_size=max(length // 50, 10)
    )
    question, begun = _split(text, generator.CONFIG["answer_prefix"])
    return RulerText(question, begun, tuple(words))


def _no_tokens(text: str) -> SimpleNamespace:
    """A tokenizer for which every text fits: lm-eval's own fitting is not wanted."""
    return SimpleNamespace(input_ids=())


def _split(text: str, prefix: str) -> tuple[str, str]:
    """The question, and the beginning of the answer behind it."""
    place = text.rindex(prefix)
    return text[:place].strip(), text[place:].strip()


@cache
def _generator(module: str) -> Any:
    # lm-eval fetches data of nltk when its needles are imported, on the first of several processes. Only
    # essays need that data.
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = "1"
    try:
        return import_module(f"{_MODULES}.{module}")
    finally:
        if before is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = before

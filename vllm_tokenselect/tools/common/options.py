"""Options that come as text: lists with commas, and JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from math import inf
from typing import Any, TypeVar

_Number = TypeVar("_Number", int, float)
_Value = TypeVar("_Value")
SUCH_AS = '{"top_k": 1024}'


def words(listed: str) -> tuple[str, ...]:
    """What stands between commas."""
    return tuple(word.strip() for word in listed.split(",") if word.strip())


def positive_numbers(listed: str, option: str, such_as: str) -> tuple[int, ...]:
    """Whole numbers above 0, with commas between them.

    Raises:
        ValueError: saying how they are written.
    """
    found = _numbers(listed, int)
    if not found or min(found) < 1:
        raise ValueError(f"{option} {listed!r}: {such_as}")
    return found


def lengths_of(listed: str) -> tuple[int, ...]:
    """`--lengths`: numbers of tokens."""
    return positive_numbers(listed, "--lengths", "tokens, separated by commas, as 4096,32768")


def rates_of(listed: str) -> tuple[float, ...]:
    """`--rates`: requests a second.

    Raises:
        ValueError: saying how they are written.
    """
    found = _numbers(listed, float)
    if not found or not all(0 < rate < inf for rate in found):
        raise ValueError(f"--rates {listed!r}: requests a second, separated by commas, as 0.5,1,2")
    return found


def _numbers(listed: str, kind: Callable[[str], _Number]) -> tuple[_Number, ...]:
    """Numbers between commas; none at all where one of them is no number."""
    try:
        return tuple(map(kind, words(listed)))
    except ValueError:
        return ()


def json_object(text: str, option: str, such_as: str = '{"tokenselect": "off"}') -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: naming the option, and an object that it may be.
    """
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{option} {text!r} is no JSON object, such as {such_as}")
    return found


def one_of(value: str, allowed: Mapping[str, _Value], option: str) -> _Value:
    """What a word stands for.

    Raises:
        ValueError: naming the words that are allowed.
    """
    if value not in allowed:
        raise ValueError(f"{option} {value!r}: it must be one of {', '.join(allowed)}")
    return allowed[value]

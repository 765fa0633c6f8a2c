"""Options that come as text: lists with commas, and JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import inf
from typing import Any, TypeVar

_Number = TypeVar("_Number", int, float)


def words(listed: str) -> tuple[str, ...]:
    """What stands between commas."""
    return tuple(word.strip() for word in listed.split(",") if word.strip())


def lengths_of(listed: str, option: str = "--lengths") -> tuple[int, ...]:
    """Tokens, with commas between them.

    Raises:
        ValueError: saying how they are written.
    """
    found = _numbers(listed, int)
    if not found or min(found) < 1:
        raise ValueError(f"{option} {listed!r}: tokens, with commas between them, as 4096,32768")
    return found


def rates_of(listed: str, option: str = "--rates") -> tuple[float, ...]:
    """Requests a second, with commas between them.

    Raises:
        ValueError: saying how they are written.
    """
    found = _numbers(listed, float)
    if not found or not all(0 < rate < inf for rate in found):
        raise ValueError(f"{option} {listed!r}: requests a second, with commas, as 0.5,1,2")
    return found


def _numbers(listed: str, kind: Callable[[str], _Number]) -> tuple[_Number, ...]:
    """None where one of them is none."""
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


def one_of(value: str, allowed: tuple[str, ...], option: str) -> str:
    """A value that is allowed.

    Raises:
        ValueError: naming those that are.
    """
    if value not in allowed:
        raise ValueError(f"{option} {value!r}: it is {' or '.join(allowed)}")
    return value

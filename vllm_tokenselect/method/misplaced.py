"""Names that look like ours, in places where vLLM takes any name and reads only those that it knows."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from difflib import SequenceMatcher
from functools import lru_cache
from typing import Any

KEY = "tokenselect"
_ALIKE = 0.85  # one letter of `tokenselect` missing, added, changed or swapped


@lru_cache(maxsize=1024)
def looks_like_ours(name: str) -> bool:
    """Whether a name holds `tokenselect`, or nearly so, whatever its case and separators."""
    plain = _plain(name)
    ends = plain[: len(KEY)], plain[-len(KEY) :]
    return KEY in plain or any(SequenceMatcher(None, end, KEY).ratio() >= _ALIKE for end in ends)


def find_misplaced(names: Collection[str], settings: Collection[str]) -> list[str]:
    """Which names are not `tokenselect` and yet look like it, or like one of the settings below it."""
    plain_settings = {_plain(setting) for setting in settings}
    return [
        name
        for name in names
        if name != KEY and (_plain(name) in plain_settings or looks_like_ours(name))
    ]


def corrected(given: Mapping[str, Any], settings: Collection[str]) -> str:
    """The JSON that was probably meant: what is misplaced put below `tokenselect`, the rest as given."""
    misplaced = find_misplaced(given, settings)
    right = {name: value for name, value in given.items() if name not in misplaced}
    own = right.pop(KEY, {})
    own = dict(own) if isinstance(own, Mapping) else {}
    for name in misplaced:
        meant = _plain(name).replace(KEY, "")
        setting = next((setting for setting in settings if _plain(setting) == meant), None)
        if setting is not None:
            own.setdefault(setting, given[name])
        elif isinstance(given[name], Mapping):
            own = {**given[name], **own}
    return json.dumps({**right, KEY: own}, default=repr)


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())

"""Numbers of tokens and bytes, as they are typed and as they are shown."""

from __future__ import annotations

import re

_TOKENS = {"": 1, "k": 1 << 10, "m": 1 << 20}
_BYTES = {
    "mb": 10**6,
    "gb": 10**9,
    "mib": 1 << 20,
    "gib": 1 << 30,
}


def parse_tokens(text: str) -> int:
    """`131072`, `128K` (of 1,024 tokens), `1M` (of 1,024 K) or `0.5M` as tokens.

    Raises:
        ValueError: for anything else, and for less than one token.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([km]?)", text.strip().lower())
    tokens = float(found[1]) * _TOKENS[found[2]] if found else 0.0
    if tokens < 1 or tokens != int(tokens):
        raise ValueError(f"{text!r} is no number of tokens, such as 131072, 128K, 1M or 0.5M")
    return int(tokens)


def parse_bytes(text: str) -> int:
    """`141GB` (of 10^9 bytes), `80GiB` (of 2^30), `500MB` or `512MiB` as bytes.

    Raises:
        ValueError: for anything else; a number alone has no unit.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([mg]i?b)", text.strip().lower())
    size = int(float(found[1]) * _BYTES[found[2]]) if found else 0
    if size < 1:
        raise ValueError(f"{text!r} is no size of a memory, such as 80GiB or 141GB")
    return size


def show_bytes(size: float) -> str:
    """Bytes with the largest unit of 1,024 in which they are at least 1."""
    shown, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(shown) < 1024:
            break
        shown, unit = shown / 1024, larger
    return f"{shown:.0f} {unit}" if unit == "B" or abs(shown) >= 100 else f"{shown:.1f} {unit}"


def show_tokens(tokens: int) -> str:
    """Tokens in the shortest exact form that `parse_tokens` reads."""
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size}{unit}"
    return f"{tokens:,}"

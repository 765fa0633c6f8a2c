"""URLs of servers, as users write them. Apart, since it needs no package of an extra."""

from __future__ import annotations


def bare_url(url: str) -> str:
    """A server's URL without the `/v1` and the slash that it may end with."""
    return url.rstrip("/").removesuffix("/v1")

"""What a server answers to somebody who has no key."""

from __future__ import annotations

import json
import urllib.error
import urllib.request

# FastAPI's own pages, and the folder of metrics: they stand in no list of operations.
BESIDE = ("/docs", "/metrics", "/openapi.json", "/redoc")


def operations(url: str) -> list[tuple[str, str]]:
    """Method and path of everything that a server says it answers, without a key."""
    with urllib.request.urlopen(f"{url}/openapi.json", timeout=30) as answer:
        paths = json.load(answer)["paths"]
    said = [(method.upper(), path) for path, methods in paths.items() for method in methods]
    return said + [("GET", path) for path in BESIDE]


def answered_without_a_key(url: str, asked: list[tuple[str, str]]) -> set[str]:
    """The paths that are neither refused (401) nor unknown (404)."""
    return {path for method, path in asked if status(url, method, path) not in (401, 404)}


def status(url: str, method: str, path: str) -> int:
    """The status of an empty request."""
    data = b"{}" if method == "POST" else None
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}{path}", data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code

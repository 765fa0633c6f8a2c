"""What a server says of itself: its model, the longest context, what it has selected so far."""

from __future__ import annotations

import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_tokenselect.tools.common.client import ServerError

_ATTENDED = "vllm:tokenselect_tokens_attended_total"
_IN_CONTEXT = "vllm:tokenselect_tokens_in_context_total"
_ROWS = "vllm:tokenselect_rows_total"
ROW_KINDS = ("reselected", "reused", "shared", "dense")


@dataclass(frozen=True)
class ServerFacts:
    """A server and the model that it is asked for.

    Attributes:
        url: without `/v1`.
        model: the name that it is served under.
        root: the folder or name that it was loaded from, where the server tells.
        max_model_len: tokens of context, where the server tells.
        version: of vLLM, where the server tells it.
    """

    url: str
    model: str
    root: str | None
    max_model_len: int | None
    version: str | None


def bare_url(url: str) -> str:
    """A server's URL without the `/v1` and the slash that it may end with."""
    return url.rstrip("/").removesuffix("/v1")


def ask_server(url: str, model: str | None) -> ServerFacts:
    """Ask a server which models it has.

    Args:
        url: with or without `/v1`.
        model: the name of the one to be asked; None when there is only one.

    Raises:
        ServerError: when it does not answer, or does not have the model.
    """
    url = bare_url(url)
    try:
        served = {entry["id"]: entry for entry in request(f"{url}/v1/models")["data"]}
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, urllib.error.HTTPError) and error.code in (401, 403):
            raise ServerError(
                f"{url} refuses the API key (HTTP {error.code}): set OPENAI_API_KEY to the one that the "
                "server was started with"
            ) from error
        raise ServerError(
            f"{url}/v1/models does not answer ({error}): start the server first (vllm serve MODEL "
            "--attention-backend TOKENSELECT), or name where it listens, as http://HOST:PORT"
        ) from error
    names = ", ".join(served)
    if model is None and len(served) != 1:
        raise ServerError(f"{url} serves {names or 'no model'}: name one of them by --model")
    if model is not None and model not in served:
        raise ServerError(f"{url} does not serve {model!r}, but {names}: name one of these")
    name = model or next(iter(served))
    entry = served[name]
    try:
        version = request(f"{url}/version").get("version")
    except (OSError, ValueError):
        version = None
    return ServerFacts(url, name, entry.get("root"), entry.get("max_model_len"), version)


def refuse_lengths(facts: ServerFacts, lengths: Iterable[int], answer: int = 0) -> None:
    """Refuse lengths that the server's model cannot take.

    Args:
        answer: tokens of the answer, where the lengths are of prompts alone.

    Raises:
        ServerError: naming them, the most that is allowed, and what to do.
    """
    limit = facts.max_model_len
    too_long = [length for length in lengths if limit is not None and length + answer > limit]
    if too_long:
        told = f" and {answer} of an answer" if answer else ""
        raise ServerError(
            f"--lengths {', '.join(map(str, too_long))}{told}: {facts.model} at {facts.url} takes {limit} "
            "tokens at most, prompt and answer together; ask for less, or start the server with a "
            "larger --max-model-len"
        )


def selection_counts(url: str) -> dict[str, float] | None:
    """What was selected since the server started, summed over layers.

    Returns:
        tokens "attended" to and "in_context" and, where the server tells, rows of each of `ROW_KINDS`; None
        without such counters: the server does not run on TOKENSELECT, or does not tell.
    """
    try:
        with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
            text = answer.read().decode()
    except OSError:
        return None
    found = {"attended": _sum(text, _ATTENDED), "in_context": _sum(text, _IN_CONTEXT)}
    if None in found.values():
        return None
    found |= {kind: _sum(text, _ROWS, f'kind="{kind}"') for kind in ROW_KINDS}
    return {name: count for name, count in found.items() if count is not None}


class SelectionCounter:
    """What a server selects from one reading of its counters to the next.

    Args:
        url: of the server, whose counters are read at once.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._last = selection_counts(url)

    def read(self) -> Mapping[str, float] | None:
        """What came since the last reading; None where the server does not count."""
        before, self._last = self._last, selection_counts(self._url)
        if before is None or self._last is None:
            return None
        return {name: self._last[name] - before[name] for name in self._last if name in before}


def _sum(text: str, counter: str, label: str = "") -> float | None:
    samples = re.findall(rf"^{counter}(?:{{([^}}]*)}})? (\S+)$", text, re.MULTILINE)
    values = [float(value) for labels, value in samples if label in labels]
    return sum(values) if values else None


def request(url: str, body: Mapping[str, Any] | None = None, timeout: float = 60.0) -> Any:
    """GET a JSON document, or POST one.

    Raises:
        OSError: when the server does not answer, or with an error.
        ValueError: when the answer is no JSON.
    """
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(url, data, headers)
    with urllib.request.urlopen(asked, timeout=timeout) as answer:
        return json.load(answer)

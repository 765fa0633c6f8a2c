"""The tokenizer of a served model: a local one, or the server's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_tokenselect.tools.common.client import ServerError
from vllm_tokenselect.tools.common.server_facts import ServerFacts, request

_PROBE = "The 12 ferries of Åland, 3.5 miles apart;\n\tall of them yellow."


class ServerTokenizer:
    """vLLM's `/tokenize` and `/detokenize`, with the methods of transformers' tokenizers that tasks use.

    Args:
        facts: the server.
        chat: use the model's chat template, if it has one.
    """

    eos_token_id: int | None = None

    def __init__(self, facts: ServerFacts, chat: bool = True) -> None:
        self._facts = facts
        self._known: dict[tuple[str, bool], list[int]] = {}
        self.chat_template: str | None = None
        if chat:
            try:
                self.apply_chat_template([{"role": "user", "content": "?"}])
                self.chat_template = "the server's"
            except OSError:
                pass  # the model has none

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Tokens of a text."""
        key = (text, add_special_tokens)
        if key not in self._known:
            body = {"prompt": text, "add_special_tokens": add_special_tokens}
            self._known[key] = self._ask("/tokenize", body)["tokens"]
        return list(self._known[key])

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""
        return str(self._ask("/detokenize", {"tokens": list(tokens)})["prompt"])

    def apply_chat_template(
        self,
        messages: list[dict[str, str]],
        tokenize: bool = False,
        add_generation_prompt: bool = True,
    ) -> str:
        """A conversation as the model reads it."""
        body = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        return self.decode(self._ask("/tokenize", body)["tokens"])

    def _ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = request(
            self._facts.url + path, {"model": self._facts.model, **body}
        )
        return answer


def shared_tokenizer(servers: Sequence[ServerFacts], path: str | None, chat: bool) -> Any:
    """The tokenizer of the last server, which the others must have too; arguments as for `load_tokenizer`.

    Raises:
        ServerError: when there is none, or the servers cut a text differently.
    """
    tokenizer = load_tokenizer(servers[-1], path, chat)
    for facts in servers[:-1]:
        refuse_other_tokenizer(facts, tokenizer, servers[-1].model)
    return tokenizer


def load_tokenizer(facts: ServerFacts, path: str | None, chat: bool) -> Any:
    """The tokenizer at `path`, or in the folder that the server's model was loaded from, or the server's.

    Args:
        path: a folder, or a name that transformers knows.
        chat: use the model's chat template, if it has one.

    Raises:
        ServerError: when there is none of these, or the one at `path` is not the model's.
    """
    local = path or (facts.root if facts.root and Path(facts.root).is_dir() else None)
    if local is None:
        if not _server_tokenizes(facts):
            raise ServerError(
                f"{facts.url} has no /tokenize, and its model {facts.root or facts.model!r} is no folder "
                "here: name the model's tokenizer by --tokenizer, a folder or a name on the hub"
            )
        return ServerTokenizer(facts, chat)
    tokenizer = _local_tokenizer(local)
    if not chat:
        tokenizer.chat_template = None
    refuse_other_tokenizer(facts, tokenizer, local)
    return tokenizer


def refuse_other_tokenizer(facts: ServerFacts, tokenizer: Any, name: str) -> None:
    """Compare a tokenizer with the server's, if the server has /tokenize.

    Raises:
        ServerError: when they cut a text differently.
    """
    if _server_tokenizes(facts):
        ours = tokenizer.encode(_PROBE, add_special_tokens=False)
        if ours != ServerTokenizer(facts, chat=False).encode(_PROBE, add_special_tokens=False):
            raise ServerError(
                f"the tokenizer of {name} is not that of {facts.model} at {facts.url}: name the "
                "served model's by --tokenizer"
            )


def _server_tokenizes(facts: ServerFacts) -> bool:
    try:
        ServerTokenizer(facts, chat=False).encode("?")
    except (OSError, ValueError, KeyError):
        return False
    return True


def _local_tokenizer(path: str) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ServerError(
            f"--tokenizer {path}: transformers cannot load it ({error}); name a folder with "
            "tokenizer files, or leave it out where the server has /tokenize"
        ) from error
    # No warning about long texts: they are what is measured.
    tokenizer.model_max_length = 10**9
    return tokenizer

"""The servers of `tokenselect bench`: started here, or running somewhere."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from vllm_tokenselect.tools.bench.machine import has_gpu
from vllm_tokenselect.tools.common.extras import vllm_is_missing
from vllm_tokenselect.tools.common.server import ServerFailed, VllmServer
from vllm_tokenselect.tools.common.server_facts import ServerFacts, ask_server, bare_url
from vllm_tokenselect.tools.common.smollm2 import ensure_smollm2

OWN = "TOKENSELECT"
VLLMS_CHOICE = "vLLM"  # the name of a server whose attention backend vLLM chooses
_GPU_MEMORY = 0.9  # share of a GPU that all servers take together


@dataclass(frozen=True)
class Served:
    """A server that can be asked.

    Attributes:
        name: its name in results.
        facts: what it says of itself.
        server: the process; None for a server that was not started here.
        described: what the report says of it.
    """

    name: str
    facts: ServerFacts
    server: VllmServer | None
    described: dict[str, Any]


@dataclass(frozen=True)
class RunningServers:
    """Two servers that already run, by their URLs.

    Args:
        a: the server that B is compared with.
        b: the server on TOKENSELECT.
        model: its name on both; None for the only one of each.

    Raises:
        ValueError: when one is missing, or they are the same.
    """

    a: str | None
    b: str | None
    model: str | None
    are_here = False

    def __post_init__(self) -> None:
        if self.a is None or self.b is None:
            raise ValueError("--a and --b go together: two running servers, A B A B")
        if bare_url(self.a) == bare_url(self.b):
            raise ValueError(
                f"--a and --b are both {self.a}: B would find each prompt of A in its prefix cache"
            )

    def max_length(self) -> int | None:
        """Tokens of prompt and answer that all of them take; None where no server tells."""
        limits = [served.facts.max_model_len for served in self._served()]
        return min((limit for limit in limits if limit is not None), default=None)

    def start(self, stack: ExitStack, length: int, console: Console) -> list[Served]:
        """They run already."""
        return self._served()

    def _served(self) -> list[Served]:
        found = []
        for name, url in (("A", self.a), ("B", self.b)):
            facts = ask_server(str(url), self.model)
            described = {"url": facts.url, "model": facts.model, "version": facts.version}
            found.append(Served(name, facts, None, described))
        return found


@dataclass(frozen=True)
class StartedServers:
    """`vllm serve` with vLLM's own attention, with TOKENSELECT, and with more settings of it.

    Args:
        model: folder or name; None for SmolLM2-135M-Instruct.
        baseline: attention backend to compare with; None for vLLM's choice.
        settings: of TOKENSELECT.
        also: settings on top of these, each for one more server.
        serve_args: more arguments of all servers.
        timeout: seconds that each may take to start.

    Raises:
        ValueError: naming what cannot be started.
    """

    model: str | None
    baseline: str | None
    settings: Mapping[str, Any]
    also: tuple[Mapping[str, Any], ...]
    serve_args: tuple[str, ...]
    timeout: float
    are_here = True

    def __post_init__(self) -> None:
        if sentence := vllm_is_missing():
            raise ValueError(sentence)
        if self.baseline == OWN:
            raise ValueError(
                f"--baseline {OWN}: to compare settings of {OWN} with each other, use --also"
            )
        if self.serve_args and not self.serve_args[0].startswith("-"):
            raise ValueError(
                f"{self.serve_args[0]!r}: arguments for `vllm serve` stand behind --, as in "
                "-- --dtype bfloat16; the model is named by --model"
            )
        texts = [json.dumps(more) for more in self.also]
        if len(set(texts)) < len(texts):
            raise ValueError(f"--also {', --also '.join(texts)}: one of them is there twice")

    @property
    def contenders(self) -> dict[str, dict[str, Any] | None]:
        """Settings of each server by its name; None for vLLM's own attention."""
        more = {f"{OWN} {json.dumps(one)}": {**self.settings, **one} for one in self.also}
        return {self.baseline or VLLMS_CHOICE: None, OWN: dict(self.settings), **more}

    def max_length(self) -> int | None:
        """Tokens of the longest context by the model's configuration; None if it does not tell.

        Raises:
            ValueError: when there is no such model.
        """
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(self._model())
        except OSError as error:
            raise ValueError(f"--model {self.model}: {error}") from error
        except ValueError:
            return None  # transformers does not know it; vLLM may
        return getattr(config.get_text_config(), "max_position_embeddings", None)

    def start(self, stack: ExitStack, length: int, console: Console) -> list[Served]:
        """Start them, one after the other; `stack` stops them.

        Args:
            length: tokens of prompt and answer that each must take.

        Raises:
            ServerFailed: when one does not start.
        """
        return [
            self._start(stack, name, settings, length, console)
            for name, settings in self.contenders.items()
        ]

    def _start(
        self,
        stack: ExitStack,
        name: str,
        settings: dict[str, Any] | None,
        length: int,
        console: Console,
    ) -> Served:
        model = self._model()
        backend = self.baseline if settings is None else OWN
        server = VllmServer(
            model,
            backend=backend,
            settings=settings,
            enforce_eager=False,
            # The user's arguments come last, so that they win.
            extra_args=["--max-model-len", str(length), *self._share_of_gpu(), *self.serve_args],
            env=_may_download(model),
        )
        with console.status(f"{name}: starting vLLM") as status:
            try:
                server.start(
                    self.timeout,
                    on_progress=lambda stage, _: status.update(f"{name}: starting vLLM: {stage}"),
                )
            except ServerFailed as error:
                raise ServerFailed(f"{name}: {error}") from error
        stack.callback(server.stop)
        facts = ask_server(server.base_url, None)
        described = {
            "attention_backend": backend,
            "settings": settings,
            "serve_args": list(self.serve_args),
            "version": facts.version,
        }
        return Served(name, facts, server, described)

    def _model(self) -> str:
        return self.model or str(ensure_smollm2())

    def _share_of_gpu(self) -> list[str]:
        """The share of a GPU's memory for each server, which would otherwise take all of it."""
        share = _GPU_MEMORY / len(self.contenders)
        return ["--gpu-memory-utilization", f"{share:.2f}"] if has_gpu() else []


def _may_download(model: str) -> dict[str, str]:
    """Let a server download its model, unless the model is a folder or the user has forbidden it."""
    if Path(model).is_dir() or "HF_HUB_OFFLINE" in os.environ:
        return {}
    return {"HF_HUB_OFFLINE": "0"}

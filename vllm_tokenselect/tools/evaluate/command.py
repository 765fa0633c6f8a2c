"""`tokenselect eval`: accuracy of one served model, or of two side by side."""

from __future__ import annotations

import asyncio
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from vllm_tokenselect.tools.common.client import Endpoint
from vllm_tokenselect.tools.common.measurement import run_measurement
from vllm_tokenselect.tools.common.progress import counted
from vllm_tokenselect.tools.common.provenance import now, typed_command, versions
from vllm_tokenselect.tools.common.server_facts import (
    SelectionCounter,
    ServerFacts,
    ask_server,
    refuse_lengths,
)
from vllm_tokenselect.tools.common.text import chapters_of
from vllm_tokenselect.tools.common.tokenizers import shared_tokenizer
from vllm_tokenselect.tools.evaluate.cells import Cell, CellFile
from vllm_tokenselect.tools.evaluate.perplexity import loss_table
from vllm_tokenselect.tools.evaluate.plots import draw
from vllm_tokenselect.tools.evaluate.questions import EvalSettings, cells, refuse_what_does_not_fit
from vllm_tokenselect.tools.evaluate.rates import difference_table, mean_table, rate_table
from vllm_tokenselect.tools.evaluate.run import (
    AFTER,
    BEFORE,
    new_client,
    refuse_what_a_server_cannot,
    run,
    summarize,
)
from vllm_tokenselect.tools.evaluate.tasks import DEFAULT, known_tasks

_VERSIONS = ("vllm-tokenselect", "lm-eval", "transformers", "aiohttp")


@dataclass(frozen=True)
class Side:
    """A server, the model that it is asked for, and extra arguments of vLLM for each request."""

    url: str
    model: str | None = None
    xargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EvalOptions:
    """The options of the command.

    Attributes:
        served: the server in question, B.
        against: the server that B is compared with, A.
        tokenizer: a folder or name; None for the server's own.
        chat_api: ask `/v1/chat/completions`.
        chat_template: put prompts into the model's chat template, if it has one.
        text: a file to read for perplexity.
        json: where results go, cell by cell.
        resume: go on with what `json` has.
        plots: a folder for plots.
        settings: the other arguments of `EvalSettings`; `tasks` is None for the default.
    """

    served: Side
    against: Side | None
    tokenizer: str | None
    chat_api: bool
    chat_template: bool
    text: Path | None
    json: Path | None
    resume: bool
    plots: Path | None
    settings: Mapping[str, Any]


def run_evaluation(options: EvalOptions, console: Console, errors: Console) -> int:
    """Ask, keep, count, draw; returns the exit status of `run_measurement`."""
    return run_measurement(lambda _: AccuracyMeasurement(options, console), errors)


class AccuracyMeasurement:
    """A measurement, whose options and servers were checked when it was made.

    Raises:
        ServerError: what a server cannot be asked, and what to do.
        ValueError: an option that cannot be used, and what is allowed.
        OSError: a file that cannot be read.
    """

    def __init__(self, options: EvalOptions, console: Console) -> None:
        self._options, self._console = options, console
        asked = options.settings["tasks"]
        tasks = known_tasks(DEFAULT if asked is None else asked)
        chapters = None if options.text is None else chapters_of(options.text)
        self.settings = EvalSettings(**{**options.settings, "tasks": tasks}, chapters=chapters)
        self.sides = {} if options.against is None else {BEFORE: options.against}
        self.sides[AFTER] = options.served
        self.facts = {name: ask_server(side.url, side.model) for name, side in self.sides.items()}
        for facts in self.facts.values():
            refuse_lengths(facts, self.settings.lengths)
        chat = options.chat_template and not options.chat_api
        self.tokenizer = shared_tokenizer([*self.facts.values()], options.tokenizer, chat)
        refuse_what_does_not_fit(self.tokenizer, self.settings)
        self.endpoints = {
            name: Endpoint(
                self.facts[name].url,
                self.facts[name].model,
                {"vllm_xargs": dict(side.xargs)} if side.xargs else {},
                options.chat_api,
            )
            for name, side in self.sides.items()
        }
        asyncio.run(self._refuse_what_servers_cannot())
        self._head = self._head_of_run()
        self.report = CellFile(options.json, self._fixed(), options.resume, self._head)

    def _head_of_run(self) -> dict[str, Any]:
        """What the reader of a report must know of this run."""
        names = ("tasks", "lengths", "samples", "texts", "seed", "concurrency")
        return {
            "command": typed_command(["tokenselect"]),
            "environment": {
                **versions(_VERSIONS),
                "python": platform.python_version(),
                "platform": platform.platform(),
                "date": now(),
            },
            "servers": {name: vars(facts) for name, facts in self.facts.items()},
            "asked": {name: getattr(self.settings, name) for name in names},
        }

    def _fixed(self) -> dict[str, Any]:
        """What all cells have in common."""
        template = self.tokenizer.chat_template is not None
        return {
            "servers": {
                name: {"model": self.facts[name].model, "vllm_xargs": dict(side.xargs)}
                for name, side in self.sides.items()
            },
            "prompts": "chat API" if self._options.chat_api else "chat" if template else "plain",
            "depths": self.settings.depths,
            "steps": self.settings.steps,
            "text": "Python documentation"
            if self._options.text is None
            else str(self._options.text),
        }

    async def _refuse_what_servers_cannot(self) -> None:
        for endpoint in self.endpoints.values():
            async with new_client(endpoint, self.settings) as client:
                await refuse_what_a_server_cannot(client, self.tokenizer, self.settings.tasks)

    def run(self) -> None:
        """Ask all that is not in the report yet.

        Raises:
            ServerError: when a server refuses a request or does not answer.
        """
        counters = {name: SelectionCounter(facts.url) for name, facts in self.facts.items()}
        missing = sum(
            replace(cell, method=name) not in self.report
            for cell in cells(self.settings)
            for name in self.endpoints
        )
        with counted(self._console, missing) as advance:

            def on_done(cell: Cell) -> None:
                advance(f"{cell.method}: {cell.task} in {cell.length:,} tokens")

            try:
                asyncio.run(
                    run(self.endpoints, self.settings, self.tokenizer, self.report, on_done)
                )
            finally:
                self._head["attended"] = {name: _attended(one) for name, one in counters.items()}

    def show(self) -> None:
        """Write the summary, print its tables, draw its plots."""
        summary = summarize(self.report.cells)
        self.report.write(summary)
        for name, facts in self.facts.items():
            self._console.print(self._describe(name, facts), markup=False, soft_wrap=True)

        def rows(*kinds: str) -> list[dict[str, Any]]:
            return [row for kind in kinds for row in summary if row["kind"] == kind]

        if rates := rows("rate"):
            self._console.print(rate_table(rates))
        if differences := rows("difference"):
            self._console.print(difference_table(differences, BEFORE, AFTER))
        if means := rows("mean rate", "mean difference"):
            self._console.print(mean_table(means))
        if losses := rows("loss", "loss difference"):
            self._console.print(loss_table(losses))
        if self._options.plots is not None:
            for file in draw(summary, self.report.cells, self._options.plots):
                self._console.print(str(file), markup=False, soft_wrap=True)

    def failures(self) -> str:
        """Nothing: a request that fails ends the run."""
        return ""

    def _describe(self, name: str, facts: ServerFacts) -> str:
        extra = self.endpoints[name].extra.get("vllm_xargs", "")
        words = (
            f"{name}: {facts.model} at {facts.url}, vLLM {facts.version or '?'} {extra}".rstrip()
        )
        counts = self._head.get("attended", {}).get(name)
        if counts is None:
            return words
        attended, in_context = counts["attended"], counts["in_context"]
        if attended == in_context:
            return (
                f"{words}; attended to every token of {in_context:,.0f} in context: nothing was "
                "selected, because the prompts are too short for its top_k or full attention was asked for"
            )
        return f"{words}; attended to {attended / in_context:.1%} of {in_context:,.0f} tokens in context"


def _attended(counter: SelectionCounter) -> dict[str, float] | None:
    """Tokens that were attended to and in context since the last reading; None without any."""
    counts = counter.read()
    if counts is None or counts["in_context"] <= 0:
        return None
    return {name: counts[name] for name in ("attended", "in_context")}

"""`tokenselect eval`: accuracy of one served model, or of two side by side."""

from __future__ import annotations

import asyncio
import platform
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from vllm_tokenselect.tools.common.progress import counting_bar
from vllm_tokenselect.tools.common.refusals import refuse

_VERSIONS = ("vllm-tokenselect", "lm-eval", "transformers", "aiohttp")


@dataclass(frozen=True)
class Side:
    """A server, the model that it is asked for, and extra arguments of vLLM for each request."""

    url: str
    model: str | None = None
    xargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """The arguments of the command, beside those of `evaluation.run.Settings`.

    Attributes:
        served: the server in question, B.
        against: the one that it is compared with, A.
        tokenizer: a folder or name; None for the server's own.
        chat_api: ask `/v1/chat/completions`.
        chat_template: put prompts into the model's chat template, if it has one.
        text: a file to read for perplexity.
        json: where results go, cell by cell.
        resume: go on with what `json` has.
        plots: a folder for pictures.
        settings: what is asked, as arguments of `evaluation.run.Settings`; `tasks` None for the default.
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


def run_evaluation(asked: Request, console: Console, errors: Console) -> int:
    """Ask, keep, count, draw.

    Returns:
        Exit status: 0 when all was answered, 2 for what cannot be asked, 1 when it was not answered.
    """
    from vllm_tokenselect.tools.common.client import ServerError

    # A polite `kill` ends the run as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        evaluation = Evaluation(asked, console)
    except (ServerError, ValueError, OSError) as error:
        return refuse(errors, str(error), 2)
    status = 0
    try:
        evaluation.run()
    except (ServerError, ValueError) as error:
        status = refuse(errors, str(error), 1)
    finally:
        evaluation.show()
    return status


class Evaluation:
    """A run, whose arguments and servers were checked when it was made.

    Raises:
        ServerError: what a server cannot be asked, and what to do.
        ValueError: an argument that cannot be used, and what is allowed.
        OSError: a file that cannot be read.
    """

    def __init__(self, asked: Request, console: Console) -> None:
        from vllm_tokenselect.tools.common import tokenizers
        from vllm_tokenselect.tools.common.client import Endpoint
        from vllm_tokenselect.tools.common.server_facts import ask_server, refuse_lengths
        from vllm_tokenselect.tools.common.text import chapters_of
        from vllm_tokenselect.tools.evaluate import run
        from vllm_tokenselect.tools.evaluate.cells import Report, typed_command, versions
        from vllm_tokenselect.tools.evaluate.tasks import DEFAULT, known_tasks

        self._asked, self._console = asked, console
        tasks = known_tasks(DEFAULT if asked.settings["tasks"] is None else asked.settings["tasks"])
        chapters = None if asked.text is None else chapters_of(asked.text)
        self.settings = run.Settings(**{**asked.settings, "tasks": tasks}, chapters=chapters)
        sides = {} if asked.against is None else {run.BEFORE: asked.against}
        sides[run.AFTER] = asked.served
        self.facts = {name: ask_server(side.url, side.model) for name, side in sides.items()}
        for facts in self.facts.values():
            refuse_lengths(facts, self.settings.lengths)
        chat = asked.chat_template and not asked.chat_api
        self.tokenizer = tokenizers.load_tokenizer(self.facts[run.AFTER], asked.tokenizer, chat)
        if asked.against is not None:
            other = self.facts[run.BEFORE]
            tokenizers.refuse_other_tokenizer(other, self.tokenizer, self.facts[run.AFTER].model)
        run.refuse_what_does_not_fit(self.tokenizer, self.settings)
        self.endpoints = {
            name: Endpoint(
                self.facts[name].url,
                self.facts[name].model,
                {"vllm_xargs": dict(side.xargs)} if side.xargs else {},
                asked.chat_api,
            )
            for name, side in sides.items()
        }
        asyncio.run(self._refuse_what_servers_cannot())
        self._run: dict[str, Any] = {
            "command": typed_command(["tokenselect"]),
            "environment": {
                **versions(_VERSIONS),
                "python": platform.python_version(),
                "platform": platform.platform(),
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
            },
            "servers": {name: vars(facts) for name, facts in self.facts.items()},
            "asked": {
                "tasks": list(self.settings.tasks),
                "lengths": list(self.settings.lengths),
                "samples": self.settings.samples,
                "texts": self.settings.texts,
                "seed": self.settings.seed,
                "concurrency": self.settings.concurrency,
            },
        }
        self.report = Report(asked.json, self._fixed(sides), asked.resume, self._run)

    def _fixed(self, sides: Mapping[str, Side]) -> dict[str, Any]:
        """What all cells have in common."""
        template = self.tokenizer.chat_template is not None
        return {
            "servers": {
                name: {"model": self.facts[name].model, "vllm_xargs": dict(side.xargs)}
                for name, side in sides.items()
            },
            "prompts": "chat API" if self._asked.chat_api else "chat" if template else "plain",
            "depths": self.settings.depths,
            "steps": self.settings.steps,
            "text": "Python documentation" if self._asked.text is None else str(self._asked.text),
        }

    async def _refuse_what_servers_cannot(self) -> None:
        from vllm_tokenselect.tools.evaluate.run import new_client, refuse_what_a_server_cannot

        for endpoint in self.endpoints.values():
            async with new_client(endpoint, self.settings) as client:
                await refuse_what_a_server_cannot(client, self.tokenizer, self.settings.tasks)

    def run(self) -> None:
        """Ask all that is not in the report yet."""
        from dataclasses import replace

        from vllm_tokenselect.tools.common.server_facts import attended_tokens
        from vllm_tokenselect.tools.evaluate import run

        before = {name: attended_tokens(facts.url) for name, facts in self.facts.items()}
        todo = [
            replace(cell, method=name)
            for cell in run.cells(self.settings)
            for name in self.endpoints
            if replace(cell, method=name) not in self.report
        ]
        with counting_bar(self._console) as progress:
            bar = progress.add_task("", total=len(todo))

            def on_done(cell: Any) -> None:
                words = f"{cell.method}: {cell.task} in {cell.length:,} tokens"
                progress.update(bar, advance=1, description=words)

            try:
                asyncio.run(
                    run.run(self.endpoints, self.settings, self.tokenizer, self.report, on_done)
                )
            finally:
                self._run["attended"] = {
                    name: _share(before[name], attended_tokens(facts.url))
                    for name, facts in self.facts.items()
                }

    def show(self) -> None:
        """Write the summary, print its tables, draw its pictures."""
        from vllm_tokenselect.tools.evaluate import run
        from vllm_tokenselect.tools.evaluate.perplexity import loss_table
        from vllm_tokenselect.tools.evaluate.plots import draw
        from vllm_tokenselect.tools.evaluate.rates import difference_table, mean_table, rate_table

        summary = run.summarize(self.report.cells)
        self.report.write(summary)
        for name, facts in self.facts.items():
            self._console.print(self._describe(name, facts), markup=False, soft_wrap=True)
        rows = {kind: [row for row in summary if row["kind"] == kind] for kind in _KINDS}
        if rows["rate"]:
            self._console.print(rate_table(rows["rate"]))
        if rows["difference"]:
            self._console.print(difference_table(rows["difference"], run.BEFORE, run.AFTER))
        if means := rows["mean rate"] + rows["mean difference"]:
            self._console.print(mean_table(means))
        if losses := rows["loss"] + rows["loss difference"]:
            self._console.print(loss_table(losses))
        if self._asked.plots is not None:
            for file in draw(summary, self.report.cells, self._asked.plots):
                self._console.print(str(file), markup=False, soft_wrap=True)

    def _describe(self, name: str, facts: Any) -> str:
        extra = self.endpoints[name].extra.get("vllm_xargs", "")
        words = (
            f"{name}: {facts.model} at {facts.url}, vLLM {facts.version or '?'} {extra}".rstrip()
        )
        share = self._run.get("attended", {}).get(name)
        if share is None:
            return words
        if share["attended"] == share["in_context"]:
            return (
                f"{words}; attended to every token of {share['in_context']:,.0f} in context: nothing was "
                "selected, the prompts are too short for its top_k or full attention was asked for"
            )
        return (
            f"{words}; attended to {share['attended'] / share['in_context']:.1%} of "
            f"{share['in_context']:,.0f} tokens in context"
        )


_KINDS = ("rate", "difference", "mean rate", "mean difference", "loss", "loss difference")


def _share(
    before: tuple[float, float] | None, after: tuple[float, float] | None
) -> dict[str, float] | None:
    """Tokens between two readings of the counters; None without any."""
    if before is None or after is None or after[1] <= before[1]:
        return None
    return {"attended": after[0] - before[0], "in_context": after[1] - before[1]}

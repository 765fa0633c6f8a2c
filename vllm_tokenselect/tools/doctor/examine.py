"""`tokenselect doctor`: what is installed, whether the hooks hold, and what to do if not."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_tokenselect import __version__
from vllm_tokenselect.tools.common.provenance import installed_version
from vllm_tokenselect.tools.doctor.environment import (
    CPU_DISTRIBUTION,
    NO_TORCHVISION,
    find_problems,
    lacks_torchvision,
    torchvision_for_cpus,
)

State = Literal["ok", "note", "problem"]

_STYLE = {"ok": "green", "note": "yellow", "problem": "red"}
_TIMEOUT = 600  # s; a model of 70B takes 40
_NOT_SERVED = "a server with --attention-backend TOKENSELECT would not start; see above"
_INSTALL = "install vllm-tokenselect[cpu], or vllm-tokenselect[gpu] on a machine with a GPU"


@dataclass(frozen=True)
class Row:
    """One line of the table. `remedy` is empty unless there is something to do."""

    area: str
    name: str
    state: State
    detail: str
    remedy: str = ""


def examine(model: str | None = None, settings: str = "{}") -> list[Row]:
    """Examine this Python environment and, when given, what a server would do with a model.

    Args:
        model: folder or hub name; its weights are not needed.
        settings: of tokenselect, JSON.
    """
    rows = [
        Row("versions", "vllm-tokenselect", "ok", __version__),
        Row("versions", "python", "ok", platform.python_version()),
    ]
    rows += _torch()
    rows += _vllm()
    rows += _numba()
    rows += [
        Row("environment", problem.name, "problem", problem.detail, problem.remedy)
        for problem in find_problems()
    ]
    if lacks_torchvision():
        remedy = f"tokenselect doctor --fix, or {torchvision_for_cpus()}"
        rows.append(Row("environment", "torchvision", "note", NO_TORCHVISION, remedy))
    rows += _hooks()
    if model is not None:
        rows += _layers(model, settings)
    return rows


def exit_status(rows: Sequence[Row]) -> int:
    """1 when something is wrong, otherwise 0."""
    return int(any(row.state == "problem" for row in rows))


def print_rows(rows: Sequence[Row], console: Console) -> None:
    """Print the table, and below it one line for each thing to do."""
    table = Table()
    for heading in ("", "", "state", "detail"):
        table.add_column(heading, overflow="fold")
    area = None
    for row in rows:
        if area is not None and row.area != area:
            table.add_section()
        state = f"[{_STYLE[row.state]}]{row.state}[/]"
        table.add_row(row.area if row.area != area else "", row.name, state, escape(row.detail))
        area = row.area
    console.print(table)
    todo = [row for row in rows if row.remedy]
    for row in todo:
        console.print(f"{row.name}: {row.remedy}", markup=False, highlight=False, soft_wrap=True)
    if not exit_status(rows):
        console.print("Nothing is wrong.", style="green")


def as_json(rows: Sequence[Row]) -> str:
    """The rows as a JSON object `{"ok": ..., "rows": [...]}`."""
    return json.dumps(
        {"ok": not exit_status(rows), "rows": [asdict(row) for row in rows]}, indent=2
    )


def _torch() -> list[Row]:
    try:
        import torch
    except (ImportError, OSError) as error:
        return [Row("versions", "torch", "problem", f"does not load: {error}", _INSTALL)]
    rows = [Row("versions", "torch", "ok", torch.__version__)]
    if torch.cuda.is_available() and not installed_version(CPU_DISTRIBUTION):
        rows.append(_gpu(torch.cuda.get_device_name(), torch.cuda.get_device_capability()))
        rows.append(_triton())
    else:
        threads = torch.get_num_threads()
        rows.append(Row("versions", "platform", "ok", f"cpu, {threads} threads"))
    return rows


def _gpu(name: str, capability: tuple[int, int]) -> Row:
    found = f"{name}, compute capability {capability[0]}.{capability[1]}"
    if capability < (8, 0):
        remedy = "TOKENSELECT needs 8.0 or newer; serve without it on this machine"
        return Row("versions", "platform", "problem", found, remedy)
    return Row("versions", "platform", "ok", found)


def _triton() -> Row:
    found = installed_version("triton")
    if found is None:
        remedy = "install triton (it is in vllm-tokenselect[gpu])"
        return Row("versions", "triton", "problem", "not installed", remedy)
    return Row("versions", "triton", "ok", found)


def _vllm() -> list[Row]:
    from vllm_tokenselect.plugin import UnsupportedVllm, check_vllm_version

    for distribution in (CPU_DISTRIBUTION, "vllm"):
        if found := installed_version(distribution):
            break
    else:
        return [Row("versions", "vllm", "problem", "not installed", _INSTALL)]
    try:
        check_vllm_version(found)
    except UnsupportedVllm as error:
        return [Row("versions", distribution, "problem", found, str(error))]
    return [Row("versions", distribution, "ok", found)]


def _numba() -> list[Row]:
    found = installed_version("numba")
    if found is None:
        remedy = "install numba (it is in vllm-tokenselect[cpu])"
        return [Row("versions", "numba", "problem", "not installed", remedy)]
    return [Row("versions", "numba", "ok", found)]


def _hooks() -> list[Row]:
    try:
        from vllm_tokenselect.hooks import check_installed_hooks

        findings = check_installed_hooks()
    except ImportError as error:
        return [Row("hooks", "hooks", "problem", f"cannot be checked: {error}", _INSTALL)]
    rows = []
    for finding in findings:
        broken = finding.status == "broken"
        detail = f"{finding.status}: {finding.target.rpartition(':')[2]}"
        remedy = ""
        if broken:
            detail = f"broken: {finding.target}: {finding.detail}"
            remedy = (
                "vLLM's code differs from what the hook expects; install a supported vLLM or a newer "
                "vllm-tokenselect"
            )
        rows.append(Row("hooks", finding.name, "problem" if broken else "ok", detail, remedy))
    return rows


def _layers(model: str, settings: str) -> list[Row]:
    """What a server would do with a model, asked of vLLM in a process of its own."""
    command = [sys.executable, "-m", "vllm_tokenselect.hooks.layers", model, settings]
    # Errors are needed only for a model whose code vLLM cannot import.
    environment = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", **os.environ}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=_TIMEOUT
        )
    except subprocess.TimeoutExpired:
        detail = f"vLLM did not build it within {_TIMEOUT} s, without weights"
        return [Row("model", model, "problem", detail, "start a server to see its layers")]
    answers = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not answers:
        said = (done.stderr.strip().splitlines() or ["no output"])[-1]
        detail = f"vLLM ended with status {done.returncode}: {said}"
        return [Row("model", model, "problem", detail, _NOT_SERVED)]
    return _verdict(model, json.loads(answers[-1]), done.stdout + done.stderr)


def _verdict(model: str, verdict: dict[str, Any], log: str) -> list[Row]:
    rows = []
    if verdict["guess"]:
        detail = f"its layers are only guessed from its configuration: {verdict['guess']}"
        rows.append(Row("model", "layers", "note", detail))
    rows += [Row("model", layers, "ok", runs_on) for layers, runs_on in verdict["layers"]]
    if verdict["refusal"]:
        remedy = _NOT_SERVED
        if "No module named 'torchvision'" in log:
            remedy = f"vLLM's code of this model needs torchvision: {torchvision_for_cpus()}"
        rows.append(Row("model", model, "problem", verdict["refusal"], remedy))
    elif verdict["block_size"]:
        rows.append(Row("model", "KV cache block", "ok", f"{verdict['block_size']} tokens"))
        detail = f"{verdict['query_chunk']} queries of a prompt, the most that line up with blocks"
        rows.append(Row("model", "query_chunk", "ok", detail))
    return rows

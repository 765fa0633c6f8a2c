"""The commands of `tokenselect` and their options."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from typer import Option

from vllm_tokenselect import __version__
from vllm_tokenselect.tools.cli.bench import bench
from vllm_tokenselect.tools.cli.evaluate import evaluate
from vllm_tokenselect.tools.cli.inspect import inspect, tune
from vllm_tokenselect.tools.cli.plan import plan
from vllm_tokenselect.tools.cli.required_extras import check_extras_first
from vllm_tokenselect.tools.cli.verify import verify

app = typer.Typer(
    name="tokenselect",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"vllm-tokenselect {__version__}")
        raise typer.Exit


@app.callback()
def tokenselect(
    version: Annotated[
        bool,
        Option("--version", callback=_print_version, is_eager=True, help="Print the release."),
    ] = False,
) -> None:
    """Token-level selection of the KV cache for vLLM: measure it, plan it, check it."""


app.command()(bench)
app.command("eval")(evaluate)
app.command()(inspect)
app.command()(tune)
app.command()(plan)
app.command()(verify)


@app.command()
def demo(
    keep: Annotated[bool, Option("--keep", help="Leave the server running at the end.")] = False,
    port: Annotated[int | None, Option(help="Port of the server. Default: a free one.")] = None,
) -> None:
    """Ask a small real model about a long document, on TOKENSELECT and with full attention."""
    from vllm_tokenselect.tools.common.progress import open_console
    from vllm_tokenselect.tools.demo.command import run_demo

    raise typer.Exit(run_demo(open_console(), port=port, keep=keep))


@app.command()
def doctor(
    model: Annotated[
        str | None,
        Option(
            help="Model folder or name. Show what a server would do with it; its weights are not needed."
        ),
    ] = None,
    settings: Annotated[
        str, Option("--settings", help="Settings of tokenselect for --model, as JSON.")
    ] = "{}",
    fix: Annotated[bool, Option("--fix", help="First repair what can be repaired.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print the rows as JSON.")] = False,
) -> None:
    """Check the installation: versions, hooks and layers. Say what to do where something is wrong."""
    from vllm_tokenselect.tools.doctor import examine as examination
    from vllm_tokenselect.tools.doctor.environment import CannotFix, fix_environment

    try:
        json.loads(settings)
    except ValueError as error:
        raise typer.BadParameter(f"--settings is not JSON: {error}") from error
    errors = Console(stderr=True, highlight=False)
    if fix:
        try:
            for sentence in fix_environment():
                errors.print(sentence, markup=False, soft_wrap=True)
        except CannotFix as error:
            errors.print(f"Nothing was changed: {error}", style="red", markup=False)
    rows = examination.examine(model, settings)
    if as_json:
        print(examination.as_json(rows))
    else:
        examination.print_rows(rows, Console())
    raise typer.Exit(examination.exit_status(rows))


check_extras_first(app)

"""The commands of `tokenselect` and their options."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from vllm_tokenselect.cli.evaluate import evaluate

app = typer.Typer(
    name="tokenselect",
    help="Token-level selection of the KV cache for vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("eval")(evaluate)


@app.command()
def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Leave the server running.")] = False,
    port: Annotated[int | None, typer.Option(help="Port; default: a free one.")] = None,
    backend: Annotated[str, typer.Option(hidden=True)] = "TOKENSELECT",
) -> None:
    """Serve a small real model on TOKENSELECT and ask it about a long document."""
    from vllm_tokenselect.cli.demo import run_demo

    raise typer.Exit(run_demo(Console(), port=port, backend=backend, keep=keep))


@app.command()
def doctor(
    model: Annotated[
        str | None, typer.Option(help="Model folder or name: show its layers' backends.")
    ] = None,
    fix: Annotated[bool, typer.Option("--fix", help="Mend what can be mended first.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show versions, hooks and layers, and what to do where something is wrong."""
    from vllm_tokenselect.cli import doctor as examination
    from vllm_tokenselect.cli.environment import CannotFix, fix_environment

    errors = Console(stderr=True, highlight=False)
    if fix:
        try:
            for sentence in fix_environment():
                errors.print(sentence, markup=False, soft_wrap=True)
        except CannotFix as error:
            errors.print(f"Nothing was changed: {error}", style="red", markup=False)
    rows = examination.examine(model)
    if as_json:
        print(examination.as_json(rows))
    else:
        examination.print_rows(rows, Console())
    raise typer.Exit(examination.exit_status(rows))

"""The commands of `tokenselect` and their options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_tokenselect.tools.cli.bench import bench
from vllm_tokenselect.tools.cli.evaluate import evaluate
from vllm_tokenselect.tools.cli.extras import check_extras_first
from vllm_tokenselect.tools.cli.plan import plan
from vllm_tokenselect.tools.cli.refusals import said_in_words

app = typer.Typer(
    name="tokenselect",
    help="Token-level selection of the KV cache for vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("eval")(evaluate)
app.command()(plan)
app.command()(bench)


@app.command()
def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Leave the server running.")] = False,
    port: Annotated[int | None, typer.Option(help="Port; default: a free one.")] = None,
) -> None:
    """Ask a small real model about a long document, on TOKENSELECT and with full attention."""
    from vllm_tokenselect.tools.common.progress import open_console
    from vllm_tokenselect.tools.demo.command import run_demo

    raise typer.Exit(run_demo(open_console(), port=port, keep=keep))


@app.command()
def doctor(
    model: Annotated[
        str | None,
        typer.Option(
            help="Model folder or name: what a server would do with it; needs no weights."
        ),
    ] = None,
    settings: Annotated[
        str, typer.Option("--settings", help="tokenselect settings for --model, JSON.")
    ] = "{}",
    fix: Annotated[bool, typer.Option("--fix", help="Mend what can be mended first.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show versions, hooks and layers, and what to do where something is wrong."""
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


_Model = Annotated[
    str | None, typer.Argument(help="Folder or name; default: SmolLM2-135M-Instruct.")
]
_Settings = Annotated[str, typer.Option("--settings", help="tokenselect settings, JSON.")]
_Length = Annotated[int, typer.Option(help="Tokens of the built-in prompts.")]
_Device = Annotated[str, typer.Option(help="Device of torch: cpu, cuda ...")]
_Seed = Annotated[int, typer.Option(help="Of the built-in prompts.")]
_Json = Annotated[Path | None, typer.Option("--json", help="Write everything here.")]


@app.command()
def inspect(
    model: _Model = None,
    prompt: Annotated[
        Path | None, typer.Option(help="Text file; default: numbers hidden in real text.")
    ] = None,
    settings: _Settings = "{}",
    length: _Length = 6144,
    device: _Device = "cpu",
    seed: _Seed = 0,
    json_path: _Json = None,
    plot: Annotated[Path | None, typer.Option(help="Draw into this image file.")] = None,
) -> None:
    """Show, layer by layer, what selection keeps of full attention on a prompt.

    Beside the method: the same budget as a longer local window, at random, and on what full attention
    looks at most. The model is read by transformers, without a server.
    """
    from vllm_tokenselect.tools.inspect.command import Subject, run_inspect

    with said_in_words():
        subject = Subject(model, settings, device, length, seed)
        run_inspect(subject, prompt, Console(), json_path, plot)


@app.command()
def tune(
    model: _Model = None,
    prompt: Annotated[
        list[Path] | None,
        typer.Option(help="Text file whose end is predicted; may be repeated."),
    ] = None,
    budget: Annotated[
        list[int] | None, typer.Option(help="A top_k to try; may be repeated.")
    ] = None,
    max_loss: Annotated[
        float, typer.Option(help="Most that may be added to the loss, nats a token.")
    ] = 0.02,
    samples: Annotated[int, typer.Option(help="Built-in questions.")] = 16,
    count: Annotated[int, typer.Option(help="Tokens at the end of --prompt to predict.")] = 64,
    settings: _Settings = "{}",
    length: _Length = 6144,
    device: _Device = "cpu",
    seed: _Seed = 0,
    json_path: _Json = None,
) -> None:
    """Propose the smallest top_k that keeps a model's loss, on your prompts or on built-in ones."""
    from vllm_tokenselect.tools.inspect.command import Subject, run_tune

    with said_in_words():
        subject = Subject(model, settings, device, length, seed)
        budgets = budget or [256, 512, 1024, 2048, 4096]
        chosen = run_tune(
            subject, prompt or [], budgets, max_loss, samples, count, Console(), json_path
        )
    raise typer.Exit(0 if chosen is not None else 1)


check_extras_first(app)

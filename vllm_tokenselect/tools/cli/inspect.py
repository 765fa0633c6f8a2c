"""The options of `tokenselect inspect` and `tokenselect tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from typer import Argument, Option

from vllm_tokenselect.tools.cli.errors import said_in_words

_Model = Annotated[
    str | None,
    Argument(help="Model folder or name. Default: SmolLM2-135M-Instruct."),
]
_Settings = Annotated[str, Option("--settings", help="Settings of tokenselect, as JSON.")]
_Length = Annotated[int, Option(help="Tokens of each built-in prompt.")]
_Device = Annotated[str, Option(help="PyTorch's name of the device: cpu, cuda ...")]
_Seed = Annotated[int, Option(help="Seed of the built-in prompts.")]
_Json = Annotated[Path | None, Option("--json", help="Write all results to this file.")]


def inspect(
    model: _Model = None,
    prompt: Annotated[
        Path | None,
        Option(help="Text file to read. Default: real text with numbers hidden in it."),
    ] = None,
    settings: _Settings = "{}",
    length: _Length = 6144,
    device: _Device = "cpu",
    seed: _Seed = 0,
    json_path: _Json = None,
    plot: Annotated[Path | None, Option(help="Draw the layers into this image file.")] = None,
) -> None:
    """Show, layer by layer, how much of full attention the selection keeps on a prompt.

    The method is compared with three other ways to spend the same budget: a longer local window, random
    tokens, and the tokens that full attention weighs most. Transformers runs the model; no server is
    started.
    """
    from vllm_tokenselect.tools.inspect.command import Subject, run_inspect

    with said_in_words():
        subject = Subject(model, settings, device, length, seed)
        run_inspect(subject, prompt, Console(), json_path, plot)


def tune(
    model: _Model = None,
    prompt: Annotated[
        list[Path] | None,
        Option(
            help="Text file; the model predicts its last tokens. May be repeated. Default: "
            "built-in questions and texts."
        ),
    ] = None,
    budget: Annotated[
        list[int] | None,
        Option(help="A top_k to try. May be repeated. Default: 256, 512 ... 4096."),
    ] = None,
    max_loss: Annotated[
        float,
        Option(help="How much a budget may add to the loss, in nats per token."),
    ] = 0.02,
    samples: Annotated[int, Option(help="Number of built-in questions.")] = 16,
    count: Annotated[
        int, Option(help="Tokens at the end of each --prompt that the model predicts.")
    ] = 64,
    settings: _Settings = "{}",
    length: _Length = 6144,
    device: _Device = "cpu",
    seed: _Seed = 0,
    json_path: _Json = None,
) -> None:
    """Find the smallest top_k that keeps a model's loss, on your prompts or on built-in ones.

    Transformers runs the model; no server is started. The exit status is 1 when no budget keeps the loss.
    """
    from vllm_tokenselect.tools.inspect.command import Subject, run_tune

    with said_in_words():
        subject = Subject(model, settings, device, length, seed)
        budgets = budget or [256, 512, 1024, 2048, 4096]
        chosen = run_tune(
            subject, prompt or [], budgets, max_loss, samples, count, Console(), json_path
        )
    raise typer.Exit(0 if chosen is not None else 1)

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
_Dtype = Annotated[
    str | None,
    Option(help="Of the weights: bfloat16, float32 ... Default: float32 on CPUs, else the files'."),
]
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
    from vllm_tokenselect.tools.inspect.command import run_inspect
    from vllm_tokenselect.tools.inspect.subject import Subject

    with said_in_words():
        subject = Subject(model, settings, device, None, length, seed)
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
        Option(help="A top_k to try. May be repeated. Default: 512, 1024 and 2048."),
    ] = None,
    dense_layers: Annotated[
        list[int] | None,
        Option(
            help="How many first layers attend to everything, to try. May be repeated. Default: what "
            "--settings says, or else 0 and 2."
        ),
    ] = None,
    max_loss: Annotated[
        float,
        Option(help="How much the settings may add to the loss, in nats per token."),
    ] = 0.02,
    context: Annotated[
        int, Option(help="Tokens of the context at which generating should be fast.")
    ] = 16384,
    samples: Annotated[int, Option(help="Number of built-in questions.")] = 16,
    count: Annotated[
        int, Option(help="Tokens at the end of each --prompt that the model predicts.")
    ] = 64,
    settings: _Settings = "{}",
    length: _Length = 6144,
    device: _Device = "cpu",
    dtype: _Dtype = None,
    seed: _Seed = 0,
    profile: Annotated[
        Path | None, Option(help="Write the chosen settings to this file, for servers to take.")
    ] = None,
    json_path: _Json = None,
    plot: Annotated[
        Path | None,
        Option(help="Draw how much of each layer's attention the layers below it keep, here."),
    ] = None,
) -> None:
    """Find the cheapest settings that keep a model's loss, on your prompts or on built-in ones.

    First the model reads the prompts with full attention. This shows how much of a layer's attention is
    kept if it takes the selection of a layer below it, and so which layers should select (the anchors).
    Then the ends of the prompts are predicted with every budget, number of dense layers and set of anchors,
    and the loss is compared with full attention's. Of the settings that keep it, those are proposed with
    which a generated token reads least. --profile writes them to a file.

    Transformers runs the model; no server is started. The exit status is 1 when no settings keep the loss.
    """
    from vllm_tokenselect.tools.inspect.subject import Subject
    from vllm_tokenselect.tools.inspect.tune import Files, Search, run_tune

    with said_in_words():
        subject = Subject(model, settings, device, dtype, length, seed)
        budgets = budget or [512, 1024, 2048]
        search = Search(budgets, dense_layers or (), max_loss, context, samples, count)
        files = Files(json_path, plot, profile)
        keeps = run_tune(subject, prompt or [], search, files, Console())
    raise typer.Exit(0 if keeps else 1)

"""The options of `tokenselect bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_tokenselect.tools.cli.refusals import said_in_words
from vllm_tokenselect.tools.common.options import json_object, lengths_of, rates_of

_SUCH_AS = '{"top_k": 1024}'


def bench(
    serve_args: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="-- ARGUMENTS", help="Of all servers, for `vllm serve`: -- --dtype bfloat16"
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or name to serve, default: SmolLM2-135M-Instruct; with --a and --b its name there."
        ),
    ] = None,
    a: Annotated[
        str | None, typer.Option("--a", help="A running server to compare with: http://HOST:PORT")
    ] = None,
    b: Annotated[str | None, typer.Option("--b", help="A running server on TOKENSELECT.")] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Attention backend to compare with; default: vLLM's choice.")
    ] = None,
    settings: Annotated[str, typer.Option(help="tokenselect settings, JSON.")] = "{}",
    also: Annotated[
        list[str] | None,
        typer.Option(help="Settings beside these for one more server, JSON; may be repeated."),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Tokens of prompts, with commas; default: 2048 to 32768, as far as the model goes."
        ),
    ] = None,
    rounds: Annotated[
        int, typer.Option(min=1, help="New prompts of a length, and runs at a rate.")
    ] = 3,
    generations: Annotated[
        int,
        typer.Option(min=1, help="Of a prompt; from the second on the prefix cache has it."),
    ] = 4,
    output_tokens: Annotated[int, typer.Option(min=2, help="Of an answer.")] = 64,
    rates: Annotated[
        str | None,
        typer.Option(
            help="Arriving requests a second, with commas; default: 0.5, 1 and 2 times what the first "
            "server does one at a time."
        ),
    ] = None,
    rate_length: Annotated[
        int | None,
        typer.Option(help="Tokens of prompts at rates, one of --lengths; default: the shortest."),
    ] = None,
    requests: Annotated[
        int, typer.Option(min=0, help="In a run at a rate; 0 for no such run.")
    ] = 16,
    concurrency: Annotated[int, typer.Option(min=1, help="Most open requests at a time.")] = 256,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds of a request.")] = 3600.0,
    start_timeout: Annotated[
        float, typer.Option(min=1, help="Seconds that a server may take to start.")
    ] = 1800.0,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Of prompts and arrivals; default: 0, with --a and --b a new one, "
            "since their prefix caches may know the prompts.",
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="File that prompts are from; default: the Python documentation."),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or name; default: the served model's.")
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write every sample and the summary here.")
    ] = None,
    plots: Annotated[Path | None, typer.Option(help="Draw into this folder.")] = None,
) -> None:
    """Measure the speed of TOKENSELECT against vLLM's own attention, on your model and machine.

    Starts all servers, one after the other, and asks them in turn, A B A B; or asks two that run
    (--a, --b). Time to first token (TTFT) is that of a new prompt, one at a time; time per output token
    (TPOT) is measured again and again with the same one. Then requests arrive at rates, as a Poisson
    process. The exit status is 1 when a request failed. OPENAI_API_KEY is sent, if it is set.
    """
    from vllm_tokenselect.config import TokenSelectConfig
    from vllm_tokenselect.tools.bench.command import BenchOptions, run_bench
    from vllm_tokenselect.tools.bench.contenders import RunningServers, StartedServers

    with said_in_words():
        of_started = {
            "--baseline": baseline is not None,
            "--settings": settings != "{}",
            "--also": bool(also),
            "arguments behind --": bool(serve_args),
        }
        if a is None and b is None:
            started = StartedServers(
                model,
                baseline,
                json_object(settings, "--settings", _SUCH_AS),
                tuple(json_object(one, "--also", _SUCH_AS) for one in also or ()),
                tuple(serve_args or ()),
                start_timeout,
            )
            for of_one in started.contenders.values():
                TokenSelectConfig.from_mapping(of_one or {})
            servers: StartedServers | RunningServers = started
        elif given := [option for option, is_given in of_started.items() if is_given]:
            raise ValueError(
                f"{', '.join(given)}: only for servers that are started here, without --a and --b"
            )
        else:
            servers = RunningServers(a, b, model)
        asked = BenchOptions(
            servers=servers,
            lengths=None if lengths is None else lengths_of(lengths),
            rate_length=rate_length,
            seed=seed,
            tokenizer=tokenizer,
            text=text,
            json=json_path,
            plots=plots,
            settings={
                "rounds": rounds,
                "generations": generations,
                "output_tokens": output_tokens,
                "rates": None if rates is None else rates_of(rates),
                "requests": requests,
                "concurrency": concurrency,
                "timeout": timeout,
            },
        )
    raise typer.Exit(run_bench(asked, Console(), Console(stderr=True)))

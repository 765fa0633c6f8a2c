"""The options of `tokenselect bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from typer import Argument, Option

from vllm_tokenselect.tools.cli.errors import said_in_words
from vllm_tokenselect.tools.common.options import SUCH_AS, json_object, lengths_of, rates_of


def bench(
    serve_args: Annotated[
        list[str] | None,
        Argument(
            metavar="-- ARGUMENTS",
            help="Arguments of `vllm serve` for all servers: -- --dtype bfloat16",
        ),
    ] = None,
    model: Annotated[
        str | None,
        Option(
            help="Model folder or name to serve. Default: SmolLM2-135M-Instruct. With --a and --b, the "
            "name of the model on these servers."
        ),
    ] = None,
    a: Annotated[
        str | None, Option("--a", help="Running server to compare with: http://HOST:PORT")
    ] = None,
    b: Annotated[str | None, Option("--b", help="Running server that uses TOKENSELECT.")] = None,
    baseline: Annotated[
        str | None, Option(help="Attention backend to compare with. Default: vLLM's choice.")
    ] = None,
    settings: Annotated[str, Option(help="Settings of tokenselect, as JSON.")] = "{}",
    also: Annotated[
        list[str] | None,
        Option(help="Settings on top of --settings for one more server, as JSON. May be repeated."),
    ] = None,
    lengths: Annotated[
        str | None,
        Option(
            help="Prompt lengths in tokens, separated by commas. Default: 2048 to 32768, as far as the "
            "model allows."
        ),
    ] = None,
    rounds: Annotated[
        int, Option(min=1, help="New prompts of each length, and runs at each rate.")
    ] = 3,
    generations: Annotated[
        int,
        Option(
            min=1,
            help="How often to generate from each prompt. From the second time on the prompt comes "
            "from the prefix cache.",
        ),
    ] = 4,
    output_tokens: Annotated[int, Option(min=2, help="Tokens to generate for each request.")] = 64,
    rates: Annotated[
        str | None,
        Option(
            help="Requests that arrive per second, separated by commas. Default: 0.5, 1 and 2 times what "
            "the first server completes when asked one request at a time."
        ),
    ] = None,
    rate_length: Annotated[
        int | None,
        Option(help="Prompt length of the runs at rates, one of --lengths. Default: the shortest."),
    ] = None,
    requests: Annotated[
        int, Option(min=0, help="Requests in each run at a rate. 0 leaves these runs out.")
    ] = 16,
    concurrency: Annotated[
        int, Option(min=1, help="How many requests may be open at a time.")
    ] = 256,
    timeout: Annotated[float, Option(min=1, help="Seconds that a request may take.")] = 3600.0,
    start_timeout: Annotated[
        float, Option(min=1, help="Seconds that a server may take to start.")
    ] = 1800.0,
    seed: Annotated[
        int | None,
        Option(
            min=0,
            help="Seed of prompts and arrivals. Default: 0; with --a and --b a random one, because their "
            "prefix caches may hold the prompts of an earlier run.",
        ),
    ] = None,
    text: Annotated[
        Path | None,
        Option(help="Text file that prompts are cut from. Default: the Python documentation."),
    ] = None,
    tokenizer: Annotated[
        str | None, Option(help="Tokenizer folder or name. Default: the served model's.")
    ] = None,
    json_path: Annotated[
        Path | None, Option("--json", help="Write every sample and the summary to this file.")
    ] = None,
    plots: Annotated[Path | None, Option(help="Draw plots into this folder.")] = None,
) -> None:
    """Measure the speed of TOKENSELECT against vLLM's own attention, on your model and machine.

    The command starts all servers, one after the other, and asks them in turn, A B A B. With --a and --b it
    asks two servers that already run. First it sends one request at a time: time to first token (TTFT) is
    measured on new prompts, time per output token (TPOT) on every generation. Then requests arrive at
    rates, as a Poisson process. The exit status is 1 when a request failed. If OPENAI_API_KEY is set, it is
    sent to the servers.
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
                json_object(settings, "--settings", SUCH_AS),
                tuple(json_object(one, "--also", SUCH_AS) for one in also or ()),
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

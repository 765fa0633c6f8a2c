"""The options of `tokenselect eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_tokenselect.tools.cli.refusals import said_in_words
from vllm_tokenselect.tools.common.options import json_object, lengths_of, one_of, words


def _lm_eval_tasks(wanted: bool) -> None:
    if wanted:
        print(Path(__file__).parent.parent / "evaluate" / "lm_eval_tasks")
        raise typer.Exit


def evaluate(
    url: Annotated[
        str, typer.Argument(help="The server in question, B: http://HOST:PORT", metavar="URL")
    ],
    against: Annotated[
        str | None, typer.Option(help="A server to compare it with, A; may be the same.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Its name at B; default: the only one.")] = None,
    against_model: Annotated[str | None, typer.Option(help="Its name at A.")] = None,
    xargs: Annotated[
        str, typer.Option(help="vLLM's extra arguments of B's requests, JSON.")
    ] = "{}",
    against_xargs: Annotated[
        str,
        typer.Option(help='Those of A\'s: {"tokenselect": "off"} is full attention.'),
    ] = "{}",
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or name; default: the served model's.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="With commas; default: all whose answers are said, without perplexity."),
    ] = None,
    lengths: Annotated[
        str, typer.Option(help="Tokens of prompt and answer, with commas.")
    ] = "4096",
    samples: Annotated[int, typer.Option(min=1, help="Prompts of a task at a length.")] = 100,
    texts: Annotated[int, typer.Option(min=1, help="Texts at a length, for perplexity.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Tokens of each that are counted.")] = 128,
    seed: Annotated[int, typer.Option(min=0, max=4000, help="Of all prompts and texts.")] = 0,
    depths: Annotated[int, typer.Option(min=1, help="Of what is hidden in noise.")] = 10,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time and server.")] = 4,
    attempts: Annotated[int, typer.Option(min=1, help="Of a request.")] = 6,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds of an attempt.")] = 600.0,
    api: Annotated[str, typer.Option(help="completions or chat")] = "completions",
    chat_template: Annotated[
        bool, typer.Option(help="Put prompts into the model's chat template, if it has one.")
    ] = True,
    text: Annotated[
        Path | None,
        typer.Option(help="File to read for perplexity; default: the Python documentation."),
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write everything here, cell by cell.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what --json has.")] = False,
    plots: Annotated[Path | None, typer.Option(help="Draw into this folder.")] = None,
    lm_eval_tasks: Annotated[
        bool,
        typer.Option(
            "--lm-eval-tasks",
            callback=_lm_eval_tasks,
            is_eager=True,
            help="Print the folder for lm-eval's --include_path, and end.",
        ),
    ] = False,
) -> None:
    """Measure the accuracy of a served model, alone or against full attention.

    Tasks: niah_single_1, niah_multikey_2, niah_multikey_3, niah_multivalue_noise, niah_multiquery_noise,
    vt, cwe, fwe (after RULER), passkey, number_string (after InfiniteBench), facts; perplexity (a request
    for each token) and perplexity_decode (vLLM's trace replay). OPENAI_API_KEY is sent, if it is set.
    """
    from vllm_tokenselect.tools.evaluate.command import EvalOptions, Side, run_evaluation

    with said_in_words():
        other = Side(against or url, against_model, json_object(against_xargs, "--against-xargs"))
        asked = EvalOptions(
            served=Side(url, model, json_object(xargs, "--xargs")),
            against=None if against is None else other,
            tokenizer=tokenizer,
            chat_api=one_of(api, ("completions", "chat"), "--api") == "chat",
            chat_template=chat_template,
            text=text,
            json=json_path,
            resume=resume,
            plots=plots,
            settings={
                "tasks": None if tasks is None else words(tasks),
                "lengths": lengths_of(lengths),
                "samples": samples,
                "texts": texts,
                "steps": steps,
                "seed": seed,
                "depths": depths,
                "concurrency": concurrency,
                "attempts": attempts,
                "timeout": timeout,
            },
        )
    errors = Console(stderr=True, highlight=False)
    raise typer.Exit(run_evaluation(asked, Console(), errors))

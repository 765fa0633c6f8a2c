"""The options of `tokenselect eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from typer import Argument, Option

from vllm_tokenselect.tools.cli.errors import said_in_words
from vllm_tokenselect.tools.common.options import json_object, lengths_of, one_of, words


def _lm_eval_tasks(wanted: bool) -> None:
    if wanted:
        print(Path(__file__).parents[1] / "evaluate" / "lm_eval_tasks")
        raise typer.Exit


def evaluate(
    url: Annotated[str, Argument(help="Server to evaluate, B: http://HOST:PORT", metavar="URL")],
    against: Annotated[
        str | None, Option(help="Server to compare B with, A. It may be the same server.")
    ] = None,
    model: Annotated[
        str | None,
        Option(help="Name of the model on B. Default: the only one that it serves."),
    ] = None,
    against_model: Annotated[
        str | None,
        Option(help="Name of the model on A. Default: the only one that it serves."),
    ] = None,
    xargs: Annotated[
        str, Option(help="vLLM's extra arguments (vllm_xargs) of each request to B, as JSON.")
    ] = "{}",
    against_xargs: Annotated[
        str,
        Option(help='The same for A. {"tokenselect": "off"} asks for full attention.'),
    ] = "{}",
    tokenizer: Annotated[
        str | None, Option(help="Tokenizer folder or name. Default: the served model's.")
    ] = None,
    tasks: Annotated[
        str | None,
        Option(help="Tasks, separated by commas. Default: all but the two of perplexity."),
    ] = None,
    lengths: Annotated[
        str, Option(help="Tokens of prompt and answer together, separated by commas.")
    ] = "4096",
    samples: Annotated[int, Option(min=1, help="Prompts of each task at each length.")] = 100,
    texts: Annotated[int, Option(min=1, help="Texts of each length, for perplexity.")] = 8,
    steps: Annotated[
        int, Option(min=1, help="Tokens at the end of each text that perplexity counts.")
    ] = 128,
    seed: Annotated[int, Option(min=0, max=4000, help="Seed of all prompts and texts.")] = 0,
    depths: Annotated[
        int, Option(min=1, help="Number of depths at which keys are hidden in noise.")
    ] = 10,
    concurrency: Annotated[
        int, Option(min=1, help="How many requests each server gets at a time.")
    ] = 4,
    attempts: Annotated[int, Option(min=1, help="How often to try each request.")] = 6,
    timeout: Annotated[float, Option(min=1, help="Seconds that an attempt may take.")] = 600.0,
    api: Annotated[str, Option(help="API to ask: completions or chat.")] = "completions",
    chat_template: Annotated[
        bool, Option(help="Put prompts into the model's chat template, if it has one.")
    ] = True,
    text: Annotated[
        Path | None,
        Option(help="Text file for perplexity. Default: the Python documentation."),
    ] = None,
    json_path: Annotated[
        Path | None, Option("--json", help="Write all results to this file, as they come.")
    ] = None,
    resume: Annotated[
        bool, Option("--resume", help="Continue the run that the --json file holds.")
    ] = False,
    plots: Annotated[Path | None, Option(help="Draw plots into this folder.")] = None,
    lm_eval_tasks: Annotated[
        bool,
        Option(
            "--lm-eval-tasks",
            callback=_lm_eval_tasks,
            is_eager=True,
            help="Print the folder for lm-eval's --include_path and exit.",
        ),
    ] = False,
) -> None:
    """Measure the accuracy of a served model, alone or compared with full attention.

    Tasks: niah_single_1, niah_multikey_2, niah_multikey_3, niah_multivalue_noise, niah_multiquery_noise,
    vt, cwe, fwe (after RULER), passkey, number_string (after InfiniteBench), facts; perplexity (a request
    for each token) and perplexity_decode (vLLM's trace replay).
    If OPENAI_API_KEY is set, it is sent to the servers.
    """
    from vllm_tokenselect.tools.evaluate.command import EvalOptions, Side, run_evaluation

    with said_in_words():
        other = Side(against or url, against_model, json_object(against_xargs, "--against-xargs"))
        asked = EvalOptions(
            served=Side(url, model, json_object(xargs, "--xargs")),
            against=None if against is None else other,
            tokenizer=tokenizer,
            chat_api=one_of(api, {"completions": False, "chat": True}, "--api"),
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

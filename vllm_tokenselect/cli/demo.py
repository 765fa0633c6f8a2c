"""`tokenselect demo`: a real model answers a question about a long document, served on TOKENSELECT."""

from __future__ import annotations

import json
import shlex
import signal
import sys
import time
from dataclasses import dataclass

import openai
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from vllm_tokenselect.cli import document
from vllm_tokenselect.cli.figures import RequestFigures, wait_for_figures
from vllm_tokenselect.cli.model import MODEL_NAME, ModelUnavailable, ensure_smollm2
from vllm_tokenselect.cli.server import ServerFailed, VllmServer

# A budget that makes a document of 6,000 tokens sparse: a query reads at most 1,664 tokens and
# those of its own chunk.
SETTINGS = {
    "top_k": 1024,
    "n_init": 128,
    "n_local": 512,
    "query_chunk": 512,
    "log_requests": True,
}
_ANSWER_TOKENS = 48


@dataclass(frozen=True)
class Answer:
    """A streamed answer: its text, the API's id, the prompt's tokens, and times in seconds."""

    text: str
    request_id: str
    prompt_tokens: int
    first_token: float
    total: float


def run_demo(console: Console, *, port: int | None, backend: str, keep: bool) -> int:
    """Run the demo from the model's download to the server's stop.

    Returns:
        The exit status: 0 when the answer is right and, on TOKENSELECT, the figures are there.
    """
    # Without this, a polite `kill` would leave the server behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    ours = backend == "TOKENSELECT"
    try:
        server = VllmServer(
            ensure_smollm2(),
            backend=backend,
            settings=SETTINGS if ours else None,
            port=port,
            extra_args=["--served-model-name", MODEL_NAME, "--max-num-seqs", "8"],
        )
        _start(server, console)
    except (ModelUnavailable, ServerFailed) as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        return 1
    try:
        answer = _ask(server, console)
        figures = wait_for_figures(server.log_path, answer.request_id) if ours else None
        status = _report(answer, figures, console, expect_figures=ours)
        if keep:
            _keep(server, console)
        elif status == 0:
            server.stop()
            server.log_path.unlink()
        return status
    except openai.OpenAIError as error:
        console.print(f"The server did not answer: {error}", style="red", markup=False)
        console.print(f"Its log: {server.log_path}", highlight=False)
        return 1
    finally:
        server.stop()


def _start(server: VllmServer, console: Console) -> None:
    shown = ["vllm", *server.command[server.command.index("serve") :]]
    console.print(f"[dim]$[/] {shlex.join(shown)}", highlight=False, soft_wrap=True)
    with _bar(console) as bars:
        task = bars.add_task("Starting vLLM", total=1.0)

        def on_progress(stage: str, share: float) -> None:
            bars.update(task, description=f"Starting vLLM: {stage}", completed=share)

        server.start(on_progress=on_progress)


def _ask(server: VllmServer, console: Console) -> Answer:
    """Send the question and print the answer as it comes."""
    words = len(document.ships_log().split())
    console.print(f"\n[bold]Question[/] about a ship's log of {words:,} words: {document.QUESTION}")
    client = openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0)
    started = time.monotonic()
    pieces: list[str] = []
    request_id, prompt_tokens, first_token = "", 0, 0.0
    reading = console.status("reading the document")
    reading.start()
    try:
        stream = client.chat.completions.create(
            model=MODEL_NAME,
            messages=[{"role": "user", "content": document.prompt()}],
            temperature=0.0,
            max_tokens=_ANSWER_TOKENS,
            stream=True,
            stream_options={"include_usage": True},
        )
        for chunk in stream:
            request_id = chunk.id
            if chunk.usage is not None:
                prompt_tokens = chunk.usage.prompt_tokens
            piece = chunk.choices[0].delta.content if chunk.choices else None
            if not piece:
                continue
            if not pieces:
                first_token = time.monotonic() - started
                reading.stop()
                console.print("[bold]Answer[/] ", end="")
            pieces.append(piece)
            console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
    finally:
        reading.stop()
    console.print("\n")
    total = time.monotonic() - started
    return Answer("".join(pieces), request_id, prompt_tokens, first_token, total)


def _report(
    answer: Answer, figures: RequestFigures | None, console: Console, *, expect_figures: bool
) -> int:
    console.print(
        f"{answer.prompt_tokens:,} tokens of prompt; first token after {answer.first_token:.1f} s, "
        f"all of it after {answer.total:.1f} s.",
        highlight=False,
    )
    status = 0
    if figures is not None:
        console.print(_table(figures))
    elif expect_figures:
        console.print("The server's log has no figures for this request.", style="red")
        status = 1
    if document.ANSWER not in answer.text:
        console.print(f"The answer is wrong: the log says {document.ANSWER}.", style="red")
        status = 1
    return status


def _table(figures: RequestFigures) -> Table:
    table = Table(title="Tokens attended of tokens in the context, summed over queries")
    table.add_column("")
    for heading in ("queries", "attended", "in context", "share", "per query"):
        table.add_column(heading, justify="right")
    for name, counts in (("prefill", figures.prefill), ("decode", figures.decode)):
        table.add_row(
            name,
            f"{counts.queries:,}",
            f"{counts.attended:,}",
            f"{counts.context:,}",
            f"{counts.share:.0%}",
            f"{counts.mean_attended:,.0f} of {counts.mean_context:,.0f}",
        )
    return table


def _keep(server: VllmServer, console: Console) -> None:
    pid, url = server.pid, f"{server.base_url}/v1/chat/completions"
    body = json.dumps({"model": MODEL_NAME, "messages": [{"role": "user", "content": "Hello!"}]})
    console.print(f"The server is left running: process {pid}, log {server.log_path}")
    console.print("Ask it with")
    console.print(
        f"  curl {url} -H 'Content-Type: application/json' -d '{body}'",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"and stop it with\n  kill {pid}", highlight=False)
    server.detach()


def _bar(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=console,
    )

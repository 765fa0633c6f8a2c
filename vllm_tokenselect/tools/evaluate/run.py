"""Ask one or two servers for all cells that are missing, and keep each answer as it comes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from vllm_tokenselect.tools.common.client import Client, Endpoint, ServerError, is_masked
from vllm_tokenselect.tools.common.text import encode
from vllm_tokenselect.tools.evaluate.cells import Cell, CellFile
from vllm_tokenselect.tools.evaluate.perplexity import loss_differences, loss_rows
from vllm_tokenselect.tools.evaluate.questions import EvalSettings, Question, cells, question
from vllm_tokenselect.tools.evaluate.rates import rate_differences, rates, task_means
from vllm_tokenselect.tools.evaluate.tasks import REPLAY, STEPS, TASKS

BEFORE, AFTER = "A", "B"
# Called with a cell that is done.
OnDone = Callable[[Cell], None]


async def refuse_what_a_server_cannot(client: Client, tokenizer: Any, tasks: Sequence[str]) -> None:
    """Ask for a few log-probabilities, if they will be asked for.

    Raises:
        ServerError: when they are not the model's, or do not come.
    """
    tokens = encode(tokenizer, "The grass is green. The sky is blue. The sun is yellow.")
    url = client.endpoint.url
    if STEPS in tasks:
        losses = [await client.loss_of_next(tokens[:-1], token) for token in tokens[:2]]
        if is_masked(losses):
            raise ServerError(
                f"{url} tells the log-probabilities of what is allowed, not those of the model: "
                "start it with --logprobs-mode raw_logprobs, vLLM's default"
            )
    if REPLAY in tasks:
        try:
            await client.replay_losses(tokens[:-2], tokens[-2:])
        except ServerError as error:
            raise ServerError(
                f"{REPLAY} needs vLLM's model runner V2, and a server that is started with "
                f"--enable-scale-out --enable-trace-replay; {error}"
            ) from error


async def run(
    endpoints: dict[str, Endpoint],
    settings: EvalSettings,
    tokenizer: Any,
    report: CellFile,
    on_done: OnDone = lambda cell: None,
) -> None:
    """Ask every server for every cell that is not in the report yet.

    Args:
        endpoints: by the name that a server's cells have.

    Raises:
        ServerError: when a server refuses a request or does not answer. What was answered is kept.
    """
    chat = any(endpoint.chat for endpoint in endpoints.values())
    queues: dict[str, asyncio.Queue[Question | None]] = {
        name: asyncio.Queue(settings.concurrency) for name in endpoints
    }

    async def make() -> None:
        for cell in cells(settings):
            missing = [name for name in endpoints if replace(cell, method=name) not in report]
            if missing:
                made = await asyncio.to_thread(question, cell, tokenizer, settings, chat=chat)
                for name in missing:
                    await queues[name].put(made)
        for queue in queues.values():
            for _ in range(settings.concurrency):
                await queue.put(None)

    async def work(name: str, client: Client) -> None:
        while (asked := await queues[name].get()) is not None:
            cell = replace(asked.cell, method=name)
            begun = time.perf_counter()
            result = await answer(client, asked, settings.steps)
            report.add(cell, result | {"seconds": round(time.perf_counter() - begun, 2)})
            on_done(cell)

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(make())
            for name, endpoint in endpoints.items():
                group.create_task(_with_client(endpoint, settings, name, work))
    except ExceptionGroup as errors:
        raise _first(errors) from errors


async def _with_client(
    endpoint: Endpoint, settings: EvalSettings, name: str, work: Callable[[str, Client], Any]
) -> None:
    async with new_client(endpoint, settings) as client, asyncio.TaskGroup() as group:
        for _ in range(settings.concurrency):
            group.create_task(work(name, client))


def _first(errors: ExceptionGroup[Exception]) -> Exception:
    error: Exception = errors
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error


def new_client(endpoint: Endpoint, settings: EvalSettings) -> Client:
    """A client with the limits of the settings."""
    return Client(
        endpoint,
        concurrency=settings.concurrency,
        attempts=settings.attempts,
        timeout=settings.timeout,
    )


async def answer(client: Client, asked: Question, steps: int) -> dict[str, Any]:
    """Ask a question. The result has the scored answer, or the losses of the text's last tokens."""
    if asked.prompt is not None:
        task, prompt = TASKS[asked.cell.task], asked.prompt
        said = await client.say(prompt.tokens, asked.text, task.max_tokens)
        found = {
            "depth": round(prompt.depth, 4),
            "expected": list(prompt.expected),
            "said": said,
            "right": task.score(said, prompt.expected),
        }
        return {"answers": [found]}
    tokens = list(asked.read)
    if asked.cell.task == REPLAY:
        losses = await client.replay_losses(tokens[:-steps], tokens[-steps:])
    else:
        losses = await step_by_step(client, tokens, steps)
    return {"losses": [round(loss, 5) for loss in losses]}


async def step_by_step(client: Client, tokens: list[int], steps: int) -> list[float]:
    """Losses [steps], nats, of the last tokens of a text, each asked for by a request of its own.

    The prompt of each request ends right before the token. With full attention that changes nothing. With
    TokenSelect the last `tail_queries` of a prompt each select for themselves, as generated tokens do when
    they reuse no selection. So this is the loss of decoding without the Selection Cache; `replay_losses`
    gives the loss with it. All but the last few hundred tokens of each prompt come from the prefix cache.
    `prompt_logprobs` of one long prompt would be cheaper, but its tokens select together in chunks, which
    generated tokens never do.
    """
    starts = range(len(tokens) - steps, len(tokens))
    first = await client.loss_of_next(tokens[: starts[0]], tokens[starts[0]])
    rest = [client.loss_of_next(tokens[:start], tokens[start]) for start in starts[1:]]
    return [first, *await asyncio.gather(*rest)]


def summarize(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rates, losses and their differences between the servers, and means over tasks, as rows."""
    answered = [cell for cell in done if "answers" in cell]
    read = [cell for cell in done if "losses" in cell]
    of_tasks = [
        *({"kind": "rate"} | row for row in rates(answered)),
        *rate_differences(answered, BEFORE, AFTER),
    ]
    return [
        *of_tasks,
        *task_means(of_tasks),
        *loss_rows(read),
        *loss_differences(read, BEFORE, AFTER),
    ]

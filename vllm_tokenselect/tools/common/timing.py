"""One streamed request, and how long its tokens took."""

from __future__ import annotations

import time
from dataclasses import dataclass

from vllm_tokenselect.tools.common.client import Client, ServerError


@dataclass(frozen=True)
class TimedAnswer:
    """The outcome of a request.

    Attributes:
        ttft_s: seconds to the first token; None when none came.
        tpot_ms: mean milliseconds per token after the first; None when none came or the request failed.
        seconds: until the last token or the failure.
        output_tokens: number of tokens that came.
        error: why it failed; None when it was answered to the end.
        prompt_tokens: as the server has counted them; 0 where it does not tell.
    """

    ttft_s: float | None
    tpot_ms: float | None
    seconds: float
    output_tokens: int
    error: str | None = None
    prompt_tokens: int = 0


async def timed(
    client: Client, prompt: list[int] | str, output_tokens: int, begun: float | None = None
) -> TimedAnswer:
    """Generate from a prompt and time its tokens. A failure is an outcome too.

    Args:
        prompt: in tokens, or a text.
        output_tokens: to generate, even if the model would end before.
        begun: `time.perf_counter` at which the request arrived; None for now.
    """
    begun = time.perf_counter() if begun is None else begun
    arrivals: list[float] = []
    told, prompt_tokens, error = 0, 0, None
    body = {"prompt": prompt, "max_tokens": output_tokens, "ignore_eos": True}
    try:
        async for event in client.stream("/v1/completions", body):
            if event.get("choices"):
                arrivals.append(time.perf_counter())
            if usage := event.get("usage"):
                told, prompt_tokens = usage["completion_tokens"], usage.get("prompt_tokens", 0)
    except ServerError as failure:
        error = str(failure)
    if not arrivals:
        error = error or f"{client.endpoint.url} ended the stream without a token"
        return TimedAnswer(None, None, time.perf_counter() - begun, 0, error)
    # A server that has fallen behind may put several tokens into one event.
    came = told or len(arrivals)
    tpot_ms = 1000 * (arrivals[-1] - arrivals[0]) / (came - 1) if came > 1 and not error else None
    ended = time.perf_counter() if error else arrivals[-1]
    return TimedAnswer(arrivals[0] - begun, tpot_ms, ended - begun, came, error, prompt_tokens)

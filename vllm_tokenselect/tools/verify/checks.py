"""The checks of a running server, one after the other, each with its verdict in words."""

from __future__ import annotations

import urllib.request
import uuid
from dataclasses import dataclass, field
from typing import Any, Literal

from vllm_tokenselect.tools.common.client import Client, Endpoint, ServerError
from vllm_tokenselect.tools.common.server_facts import ServerFacts, ask_server, selection_counts
from vllm_tokenselect.tools.common.timing import TimedAnswer, timed
from vllm_tokenselect.tools.verify.answers import NEAR, ShortAnswer, ask_short, first_difference
from vllm_tokenselect.tools.verify.counting import (
    Counts,
    in_words,
    selecting_rows,
    settled_counts,
    since,
)
from vllm_tokenselect.tools.verify.prompts import SHORT, as_long_as, paragraphs

ON, OFF = "on", "off"
_NOT_SERVED = '="off" cannot be served here'
_SHORT_ANSWER, _LONG_ANSWER = 16, 32  # tokens
# Tokens of the longest context that a prompt leaves to the answer, and to a wrong guess of its length.
_SPARE = 64

State = Literal["pass", "fail", "unknown"]


@dataclass(frozen=True)
class Check:
    """A verdict. `unknown` means that the server cannot be asked this, and says why."""

    name: str
    state: State
    said: str


@dataclass
class Report:
    """All verdicts on a server, and what was measured."""

    url: str
    model: str | None = None
    checks: list[Check] = field(default_factory=list)
    measured: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return all(check.state != "fail" for check in self.checks)

    def add(self, name: str, state: State, said: str) -> None:
        self.checks.append(Check(name, state, said))


class Verification:
    """Asks one server.

    Args:
        url: with or without `/v1`.
        model: its name on the server; None for the only one.
        length: tokens of the long prompt, if the server takes as many.
        timeout: seconds that a request may take.
    """

    def __init__(self, url: str, model: str | None, length: int, timeout: float) -> None:
        self.report = Report(url, model)
        self._length, self._timeout = length, timeout

    async def run(self) -> Report:
        """Make the checks. After one without which the others mean nothing, the others are left out."""
        report = self.report
        try:
            facts = ask_server(report.url, report.model)
        except ServerError as error:
            report.add("answers", "fail", str(error))
            return report
        report.url, report.model = facts.url, facts.model
        idle = selection_counts(facts.url)
        try:
            short = await self._ask_short(facts, ON)
        except ServerError as error:
            report.add("answers", "fail", str(error))
            return report
        longest = f", contexts of up to {facts.max_model_len} tokens" if facts.max_model_len else ""
        report.add("answers", "pass", f"{facts.model}, vLLM {facts.version or '?'}{longest}")
        counted = await settled_counts(facts.url, idle)
        if counted is None:
            report.add("selects", "fail", _no_counters(facts.url))
            return report
        if await self._compare(facts, short, selecting_rows(since(idle, counted)) > 0):
            counted = await settled_counts(facts.url, counted)
        await self._ask_long(facts, short.prompt_tokens, counted)
        return report

    async def _compare(self, facts: ServerFacts, ours: ShortAnswer, selected: bool) -> bool:
        """Compare an answer to a short prompt with full attention's. Returns whether there was one."""
        told = f"a prompt of {ours.prompt_tokens} tokens"
        try:
            full = await self._ask_short(facts, OFF)
        except ServerError as error:
            state: State = "unknown" if _NOT_SERVED in str(error) else "fail"
            self.report.add("agrees", state, f"with full attention: {error}")
            return False
        at = first_difference(ours, full)
        if at is None:
            same = f"the same {len(ours.tokens)} tokens as with full attention"
            self.report.add("agrees", "pass", f"{told}: {same}")
            return True
        parts = f"{told}: token {at + 1} is another than with full attention"
        if selected:
            why = "these settings select among so few tokens already, and answers may differ"
            self.report.add("agrees", "unknown", f"{parts}; {why}")
        elif at < len(ours.margins) and ours.margins[at] < NEAR:
            near = f"the two likeliest are {ours.margins[at]:.3f} nats apart, which rounding may decide"
            self.report.add("agrees", "unknown", f"{parts}; {near}")
        else:
            self.report.add("agrees", "fail", f"{parts}, where nothing was selected")
        return True

    async def _ask_long(self, facts: ServerFacts, short_tokens: int, before: Counts | None) -> None:
        """Ask a long prompt both ways, and say what was selected and how long it took.

        Args:
            short_tokens: of the short prompt.
            before: the counters.
        """
        most = (facts.max_model_len or self._length + _SPARE) - _SPARE
        prompt = as_long_as(min(self._length, most), short_tokens)
        ours = await self._time(facts, ON, prompt)
        if ours.error:
            self.report.add("selects", "fail", ours.error)
            return
        counted = await settled_counts(facts.url, before)
        full = await self._time(facts, OFF, prompt)
        control = None
        if not full.error:
            control = since(counted, await settled_counts(facts.url, counted) or {})
        self._judge_selection(since(before, counted or {}), control, ours, self._length >= most)
        self._judge_speed(ours, full)

    def _judge_selection(
        self, counts: Counts, control: Counts | None, ours: TimedAnswer, is_longest: bool
    ) -> None:
        report, told = self.report, f"a prompt of {ours.prompt_tokens} tokens"
        report.measured |= {"prompt_tokens": ours.prompt_tokens, "counts": dict(counts)}
        if not counts.get("in_context"):
            report.add("selects", "fail", f"{told}: the counters in /metrics did not move")
        elif counts.get("reselected", 0) == 0 or counts["attended"] >= counts["in_context"]:
            todo = "ask with a larger --length"
            if is_longest:
                todo = (
                    "the server takes no longer ones, so it never selects: lower top_k, or raise "
                    "--max-model-len. What the other checks say holds"
                )
            report.add("selects", "fail", f"{told} is too short for the settings; {todo}")
        elif control is not None and (
            selecting_rows(control) or control.get("in_context") != counts["in_context"]
        ):
            said = "other requests were served meanwhile, so the counters are theirs too"
            report.add("selects", "unknown", f"{told} {in_words(counts)}; {said}")
        else:
            report.add("selects", "pass", f"{told} {in_words(counts)}")

    def _judge_speed(self, ours: TimedAnswer, full: TimedAnswer) -> None:
        self.report.measured |= {ON: _times(ours), OFF: _times(full)}
        beside = "" if full.error else f"; with full attention {_times_in_words(full)}"
        self.report.add("is timed", "pass", f"{_times_in_words(ours)}{beside}")

    async def _ask_short(self, facts: ServerFacts, switch: str) -> ShortAnswer:
        async with self._client_of(facts, switch) as client:
            return await ask_short(client, paragraphs(SHORT), _SHORT_ANSWER)

    async def _time(self, facts: ServerFacts, switch: str, prompt: str) -> TimedAnswer:
        async with self._client_of(facts, switch) as client:
            return await timed(client, prompt, _LONG_ANSWER)

    def _client_of(self, facts: ServerFacts, switch: str) -> Client:
        """A client whose requests find nothing of earlier ones in the prefix cache."""
        extra = {"vllm_xargs": {"tokenselect": switch}, "cache_salt": uuid.uuid4().hex}
        return Client(Endpoint(facts.url, facts.model, extra), timeout=self._timeout)


def _no_counters(url: str) -> str:
    try:
        with urllib.request.urlopen(f"{url}/metrics", timeout=30):
            pass
    except OSError as error:
        return f"{url}/metrics does not answer ({error}), so nobody can say what is selected"
    return (
        f"{url}/metrics has no vllm:tokenselect counters: the server runs without --attention-backend "
        "TOKENSELECT, or its workers cannot reach TOKENSELECT_METRICS_DIR (its log says so)"
    )


def _times(answer: TimedAnswer) -> dict[str, float | None] | None:
    return None if answer.error else {"ttft_s": answer.ttft_s, "tpot_ms": answer.tpot_ms}


def _times_in_words(answer: TimedAnswer) -> str:
    each = "" if answer.tpot_ms is None else f", then {answer.tpot_ms:.1f} ms a token"
    return f"first token after {answer.ttft_s:.2f} s{each}"

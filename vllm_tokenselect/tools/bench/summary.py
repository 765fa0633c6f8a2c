"""Samples as rows: medians, tails, ratios with their intervals, throughput."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import exp, log
from statistics import median

from vllm_tokenselect.tools.bench.samples import Measured, Sample, Selected
from vllm_tokenselect.tools.common.intervals import mean_interval
from vllm_tokenselect.tools.common.tables import Rows

_TIMES = ("ttft_s", "tpot_ms")


def summarize(measured: Measured) -> Rows:
    """A row for each server and prompt length, asked one at a time, and for each server and rate.

    The first server is what the others are compared with.
    """
    groups: dict[tuple[float | None, int, str], list[Sample]] = {}
    for sample in measured.samples:
        key = (sample.rate, sample.prompt_tokens, sample.contender)
        groups.setdefault(key, []).append(sample)
    selected = {(s.rate, s.prompt_tokens, s.contender): s for s in measured.selected}
    rows = []
    for key, samples in groups.items():
        rate, length, contender = key
        row = {"contender": contender, "prompt_tokens": length, "rate": rate}
        row |= {"requests": len(samples), "failed": sum(not s.is_answered for s in samples)}
        row |= {name: _spread(_times(samples, name).values()) for name in _TIMES}
        if rate is not None:
            row |= _throughput(samples, rate)
        base = groups[rate, length, measured.samples[0].contender]
        if base is not samples:
            row["faster"] = {name: _faster(base, samples, name) for name in _TIMES}
        row |= _memory(samples) | _selection(selected.get(key))
        rows.append(row)
    return rows


def _times(samples: Iterable[Sample], name: str) -> dict[tuple[int, int, float], float]:
    """A time of each answered request, by what identifies the same request to other servers.

    A time to first token counts only for a prompt's first generation; the prefix cache shortens the others.
    """
    return {
        (sample.round, sample.generation, sample.at_s): value
        for sample in samples
        if sample.is_answered
        and (name != "ttft_s" or sample.generation == 0)
        and (value := getattr(sample.answer, name)) is not None
    }


def _spread(values: Iterable[float]) -> dict[str, float] | None:
    ordered = sorted(values)
    if not ordered:
        return None
    import numpy

    return {
        "median": median(ordered),
        "p95": float(numpy.percentile(ordered, 95)),
        "min": ordered[0],
        "max": ordered[-1],
        "count": len(ordered),
    }


def _faster(
    base: Sequence[Sample], samples: Sequence[Sample], name: str
) -> dict[str, float | None] | None:
    """Speed over the base: geometric mean of the ratios of the same requests, and its interval."""
    before, after = _times(base, name), _times(samples, name)
    logs = [log(before[key] / after[key]) for key in before if key in after and after[key] > 0]
    if not logs:
        return None
    mean, low, high = mean_interval(logs)
    return {
        "ratio": exp(mean),
        "low": None if low is None else exp(low),
        "high": None if high is None else exp(high),
        "pairs": len(logs),
    }


def _throughput(samples: Sequence[Sample], rate: float) -> dict[str, float]:
    """Completed requests and their tokens per second.

    A run lasts until its last answer, and at least as long as its requests take to arrive: no more can be
    completed than arrive.
    """
    runs: dict[int, list[Sample]] = {}
    for sample in samples:
        runs.setdefault(sample.round, []).append(sample)
    seconds = sum(
        max(len(run) / rate, *(sample.at_s + sample.answer.seconds for sample in run))
        for run in runs.values()
    )
    answered = [sample.answer for sample in samples if sample.is_answered]
    return {
        "seconds": seconds,
        "waited": sum(sample.waited for sample in samples),
        "requests_per_s": len(answered) / seconds,
        "output_tokens_per_s": sum(answer.output_tokens for answer in answered) / seconds,
    }


def _memory(samples: Iterable[Sample]) -> dict[str, float | None]:
    """The most memory that the server ever had."""
    rss = [s.worker_rss_mib for s in samples if s.worker_rss_mib is not None]
    device = [s.device_mib for s in samples if s.device_mib is not None]
    return {
        "worker_rss_mib": max(rss, default=None),
        "device_mib": max(device, default=None),
    }


def _selection(selected: Selected | None) -> dict[str, float | None]:
    """Shares, 0 to 1, of the context that was attended to, and of selections that were reused."""
    if selected is None or not selected.counts["in_context"]:
        return {"attended": None, "reused": None}
    attended = selected.counts["attended"] / selected.counts["in_context"]
    return {"attended": attended, "reused": selected.reused}

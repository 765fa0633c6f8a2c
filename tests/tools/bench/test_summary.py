"""Rows say what the samples say: medians, tails, ratios, throughput, failures."""

from dataclasses import replace
from math import sqrt

import pytest

from vllm_tokenselect.tools.bench.samples import Measured, Sample, Selected
from vllm_tokenselect.tools.bench.summary import summarize
from vllm_tokenselect.tools.common.timing import TimedAnswer

ALONE = {"prompt_tokens": 1000, "rate": None, "round": 0, "generation": 0, "at_s": 0.0}
NOTHING = {"waited": False, "worker_rss_mib": None, "device_mib": None}


def sample(contender: str, ttft: float | None, tpot: float | None = 10.0, **given) -> Sample:
    error = None if ttft is not None else "HTTP 500"
    seconds = given.pop("seconds", 1.0)
    answer = TimedAnswer(ttft, tpot, seconds, 11 if error is None else 0, error)
    return Sample(contender, answer=answer, **{**ALONE, **NOTHING, **given})


def rows_of(*samples: Sample, selected: tuple[Selected, ...] = ()) -> dict[str, dict]:
    return {row["contender"]: row for row in summarize(Measured(list(samples), list(selected)))}


def test_medians_tails_and_ends_are_those_of_all_answers():
    row = rows_of(*(sample("A", float(n), round=n) for n in range(1, 102)))["A"]
    assert row["ttft_s"] == {"median": 51.0, "p95": 96.0, "min": 1.0, "max": 101.0, "count": 101}
    assert (row["requests"], row["failed"]) == (101, 0)


def test_only_new_prompts_say_how_long_the_first_token_takes():
    row = rows_of(sample("A", 4.0, 10.0), sample("A", 0.1, 30.0, generation=1))["A"]
    assert (row["ttft_s"]["median"], row["ttft_s"]["count"]) == (4.0, 1)
    assert (row["tpot_ms"]["median"], row["tpot_ms"]["count"]) == (20.0, 2)


def test_a_ratio_is_the_mean_over_pairs_of_the_same_request():
    times = {"A": (4.0, 8.0), "B": (2.0, 1.0)}
    rows = rows_of(
        *(
            sample(name, ttft, round=n)
            for name, both in times.items()
            for n, ttft in enumerate(both)
        )
    )
    faster = rows["B"]["faster"]["ttft_s"]
    assert faster["ratio"] == pytest.approx(sqrt(2 * 8))
    assert faster["low"] < faster["ratio"] < faster["high"]
    assert faster["pairs"] == 2
    assert rows["B"]["faster"]["tpot_ms"]["ratio"] == pytest.approx(1.0)
    assert "faster" not in rows["A"]


def test_a_request_that_failed_is_counted_and_its_pair_left_out():
    rows = rows_of(
        *(sample("A", 4.0), sample("B", None, None)),
        *(sample("A", 6.0, round=1), sample("B", 2.0, round=1)),
    )
    assert (rows["B"]["requests"], rows["B"]["failed"]) == (2, 1)
    assert rows["B"]["ttft_s"]["count"] == 1
    faster = rows["B"]["faster"]["ttft_s"]
    assert (faster["ratio"], faster["low"], faster["pairs"]) == (pytest.approx(3.0), None, 1)


def test_an_answer_that_broke_off_after_its_first_token_has_no_time_either():
    broken = replace(sample("A", 9.0), answer=TimedAnswer(9.0, None, 9.5, 1, "broke off"))
    row = rows_of(sample("A", 1.0, round=1), broken)["A"]
    assert (row["ttft_s"]["max"], row["ttft_s"]["count"], row["failed"]) == (1.0, 1, 1)


def test_where_all_failed_there_are_no_times():
    row = rows_of(sample("A", 1.0), sample("B", None, None))["B"]
    assert row["ttft_s"] is None
    assert row["tpot_ms"] is None
    assert row["faster"] == {"ttft_s": None, "tpot_ms": None}
    assert row["failed"] == 1


def test_throughput_is_what_was_completed_until_the_last_answer_of_each_run():
    at = {"rate": 2.0}
    row = rows_of(
        *(sample("A", 1.0, at_s=1.0, seconds=3.0, **at), sample("A", 1.0, at_s=2.0, **at)),
        sample("A", None, None, at_s=0.0, seconds=0.5, **at),
        sample("A", 1.0, at_s=5.0, seconds=1.0, round=1, waited=True, **at),
    )["A"]
    assert row["seconds"] == pytest.approx(4.0 + 6.0)
    assert row["requests_per_s"] == pytest.approx(3 / 10)
    assert row["output_tokens_per_s"] == pytest.approx(33 / 10)
    assert (row["requests"], row["failed"], row["waited"]) == (4, 1, 1)


def test_no_more_is_completed_than_arrives():
    row = rows_of(sample("A", 1.0, rate=0.1, at_s=1.0), sample("A", 1.0, rate=0.1, at_s=2.0))["A"]
    assert row["seconds"] == pytest.approx(2 / 0.1)
    assert row["requests_per_s"] == pytest.approx(0.1)


def test_memory_is_the_most_that_there_was():
    memory = ({"worker_rss_mib": 10.0, "device_mib": 70.0}, {"worker_rss_mib": 30.0})
    row = rows_of(*(sample("A", 1.0, **one) for one in memory))["A"]
    assert (row["worker_rss_mib"], row["device_mib"]) == (30.0, 70.0)
    row = rows_of(sample("A", 1.0))["A"]
    assert (row["worker_rss_mib"], row["device_mib"]) == (None, None)


def test_shares_are_of_what_was_in_context():
    selected = Selected("B", 1000, None, {"attended": 25.0, "in_context": 100.0}, 0.5)
    rows = rows_of(sample("A", 1.0), sample("B", 1.0), selected=(selected,))
    assert (rows["B"]["attended"], rows["B"]["reused"]) == (0.25, 0.5)
    assert (rows["A"]["attended"], rows["A"]["reused"]) == (None, None)


def test_lengths_and_rates_have_rows_of_their_own():
    measured = Measured(
        [
            *(sample("A", 1.0), sample("B", 1.0)),
            *(sample("A", 1.0, prompt_tokens=2000), sample("B", 1.0, prompt_tokens=2000)),
            *(sample("A", 1.0, rate=1.0), sample("B", 1.0, rate=1.0)),
        ]
    )
    found = [(row["rate"], row["prompt_tokens"], row["contender"]) for row in summarize(measured)]
    lengths = [(None, n, name) for n in (1000, 2000) for name in "AB"]
    assert found == [*lengths, (1.0, 1000, "A"), (1.0, 1000, "B")]

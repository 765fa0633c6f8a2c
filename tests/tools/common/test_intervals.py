"""Intervals are those of the literature, and hold what they say."""

import random

import pytest

from vllm_tokenselect.tools.common.intervals import (
    mean_interval,
    mean_of_estimates,
    paired_difference,
    wilson,
)


def pairs(both: int, only_before: int, only_after: int, neither: int) -> tuple[list, list]:
    """Scores of two sides, from how many prompts each of them got right."""
    before = [1] * both + [1] * only_before + [0] * only_after + [0] * neither
    after = [1] * both + [0] * only_before + [1] * only_after + [0] * neither
    return before, after


def test_a_paired_difference_has_newcombes_interval():
    # Airway hyper-responsiveness before and after a transplantation, in Fagerland, Lydersen and Laake 2014
    # (Statistics in Medicine 33, 2850-2875): Newcombe's square-and-add interval is -0.507 to -0.026.
    before, after = pairs(both=1, only_before=1, only_after=7, neither=12)
    assert paired_difference(before, after) == pytest.approx((0.2857, 0.0256, 0.5069), abs=1e-4)
    assert paired_difference(after, before) == pytest.approx((-0.2857, -0.5069, -0.0256), abs=1e-4)


def test_sides_that_never_differ_are_not_known_to_be_equal():
    difference, low, high = paired_difference(*pairs(0, 0, 0, 20))
    assert difference == 0
    assert low == pytest.approx(-0.161, abs=1e-3)
    assert high == pytest.approx(0.161, abs=1e-3)
    assert paired_difference(*pairs(10, 0, 0, 10))[0] == 0
    with_fewer = paired_difference(*pairs(5, 0, 0, 5))
    assert with_fewer[1] < paired_difference(*pairs(50, 0, 0, 50))[1] < 0


def test_pairs_that_agree_tell_more_than_the_same_rates_of_pairs_that_do_not():
    _, low, high = paired_difference(*pairs(both=40, only_before=5, only_after=5, neither=50))
    _, low_apart, high_apart = paired_difference(*pairs(20, 25, 25, 30))
    assert high - low < high_apart - low_apart


def test_the_interval_holds_the_true_difference_as_often_as_it_says():
    rng = random.Random(0)
    held = 0
    for _ in range(400):
        hard = [rng.random() < 0.4 for _ in range(60)]
        before = [float(rng.random() < (0.5 if x else 0.9)) for x in hard]
        after = [float(rng.random() < (0.4 if x else 0.9)) for x in hard]
        _, low, high = paired_difference(before, after)
        held += low <= -0.04 <= high
    assert held / 400 > 0.92


def test_shares_of_answers_get_an_interval_at_least_as_wide_as_their_spread_asks_for():
    rng = random.Random(1)
    scores = [rng.choice([0.0, 0.25, 0.5, 0.75, 1.0]) for _ in range(100)]
    low, high = wilson(sum(scores), len(scores))
    mean, narrow_low, narrow_high = mean_interval(scores)
    assert low < narrow_low < mean < narrow_high < high


def test_a_mean_has_students_interval():
    # By hand: mean 2, standard error 1 / sqrt(3), t of two degrees of freedom 4.3027.
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, -0.4841, 4.4841), abs=1e-4)
    assert mean_interval([5.0]) == (5.0, None, None)
    assert mean_interval([2.0, 2.0]) == (2.0, 2.0, 2.0)


def test_the_mean_of_tasks_is_known_better_than_each_of_them():
    mean, low, high = mean_of_estimates([(0.5, 0.3, 0.6), (0.7, 0.4, 0.8), (0.9, 0.9, 0.9)])
    assert (mean, low, high) == pytest.approx((0.7, 0.7 - 0.13**0.5 / 3, 0.7 + 0.02**0.5 / 3))
    assert mean_of_estimates([(0.5, 0.3, 0.6)]) == pytest.approx((0.5, 0.3, 0.6))


def test_the_interval_of_a_mean_of_tasks_holds_the_truth_as_often_as_it_says():
    rng = random.Random(2)
    truths, held = (0.97, 0.5, 0.1), 0
    for _ in range(400):
        right = [sum(rng.random() < truth for _ in range(16)) for truth in truths]
        _, low, high = mean_of_estimates([(n / 16, *wilson(n, 16)) for n in right])
        held += low <= sum(truths) / 3 <= high
    assert 0.92 < held / 400 < 0.99

"""Intervals of rates, of differences of rates on the same prompts, and of means."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import NormalDist, fmean, pstdev


def wilson(right: float, asked: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of a rate, after Wilson 1927: right also for few questions and rates near 0 and 1.

    Args:
        right: sum of the scores, each 0 to 1. Of scores between them the interval is wider than needed,
            since no score of a mean varies more than one that is always 0 or 1.
        asked: number of scores.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rate = right / asked
    middle = rate + z * z / (2 * asked)
    half = z * sqrt(rate * (1 - rate) / asked + z * z / (4 * asked * asked))
    scale = 1 + z * z / asked
    # Rounding must not put a rate of 0 or 1 outside its interval.
    return min(rate, (middle - half) / scale), max(rate, (middle + half) / scale)


def paired_difference(
    before: Sequence[float], after: Sequence[float], confidence: float = 0.95
) -> tuple[float, float, float]:
    """Difference of two rates on the same prompts, and its interval.

    After Newcombe 1998 (Statistics in Medicine 17, 2635-2650, method 10): Wilson's intervals of both rates,
    put together with the correlation of the pairs. It keeps a width where no pair differs, which a
    bootstrap does not.

    Args:
        before: a score, 0 to 1, of each prompt.
        after: scores of the same prompts in the same order.

    Returns:
        Mean of `after` minus mean of `before`, and the ends of its interval.
    """
    count = len(before)
    first, second = fmean(before), fmean(after)
    first_low, first_high = wilson(sum(before), count, confidence)
    second_low, second_high = wilson(sum(after), count, confidence)
    correlation = _correlation(before, after)
    difference = second - first
    below, above = second - second_low, first_high - first
    low = difference - sqrt(below**2 - 2 * correlation * below * above + above**2)
    below, above = first - first_low, second_high - second
    high = difference + sqrt(below**2 - 2 * correlation * below * above + above**2)
    return difference, max(low, -1.0), min(high, 1.0)


def _correlation(before: Sequence[float], after: Sequence[float]) -> float:
    """Pearson's, which of scores of 0 and 1 is phi, made smaller as the method wants; 0 without spread."""
    spread = pstdev(before) * pstdev(after)
    if spread == 0:
        return 0.0
    first, second = fmean(before), fmean(after)
    covariance = fmean((x - first) * (y - second) for x, y in zip(before, after, strict=True))
    if covariance > 0:
        covariance = max(covariance - 1 / (2 * len(before)), 0.0)
    return covariance / spread


def mean_of_estimates(
    estimates: Sequence[tuple[float, float, float]],
) -> tuple[float, float, float]:
    """Mean of independent estimates, each with its interval, and the mean's interval.

    By recovering the variances from the intervals (Zou and Donner 2008, Statistics in Medicine 27,
    1693-1702), as Newcombe's interval of a difference does.

    Args:
        estimates: value, low end and high end of each, all at the same confidence.
    """
    count = len(estimates)
    mean = sum(value for value, _, _ in estimates) / count
    low = mean - sqrt(sum((value - low) ** 2 for value, low, _ in estimates)) / count
    high = mean + sqrt(sum((high - value) ** 2 for value, _, high in estimates)) / count
    return mean, low, high


def mean_interval(
    values: Sequence[float], confidence: float = 0.95
) -> tuple[float, float | None, float | None]:
    """Mean and its interval by Student's t, which is None for a single value."""
    from scipy.stats import ttest_1samp

    if len(values) < 2:
        return fmean(values), None, None
    if pstdev(values) == 0:
        return values[0], values[0], values[0]
    found = ttest_1samp(values, 0.0).confidence_interval(confidence)
    return fmean(values), float(found.low), float(found.high)

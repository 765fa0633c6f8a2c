"""What a server's `/metrics` says."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families


def metric(text: str, name: str, **labels: str) -> float:
    """Sum of the samples of a metric that have these labels, in the text of `/metrics`.

    Raises:
        LookupError: when there is no such sample, which is not the same as a sum of 0.
    """
    values = [
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    if not values:
        raise LookupError(f"/metrics has no {name} with {labels}")
    return sum(values)

"""Print how much of the context a server has attended to, and how many selections it reused.

python metrics.py http://localhost:8000
"""

import sys
import urllib.request

from prometheus_client.parser import text_string_to_metric_families


def read_counter(page: str, name: str, **labels: str) -> float:
    """Sum of the samples of a counter that have these labels."""
    return sum(
        sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def main(server: str) -> None:
    with urllib.request.urlopen(f"{server}/metrics", timeout=30) as answer:
        page = answer.read().decode()
    attended = read_counter(page, "vllm:tokenselect_tokens_attended_total")
    context = read_counter(page, "vllm:tokenselect_tokens_in_context_total")
    rows = {
        kind: read_counter(page, "vllm:tokenselect_rows_total", kind=kind)
        for kind in ("reselected", "reused", "shared", "dense")
    }
    selections = rows["reselected"] + rows["reused"]
    print(f"attended to {attended / context if context else 1:.1%} of the context")
    print(f"reused {rows['reused'] / selections if selections else 0:.1%} of the selections")
    print(f"rows: {', '.join(f'{count:.0f} {kind}' for kind, count in rows.items())}")


if __name__ == "__main__":
    main(sys.argv[1])

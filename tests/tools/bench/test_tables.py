"""Tables say what the rows say, and leave out what no server tells."""

from io import StringIO

from rich.console import Console

from vllm_tokenselect.tools.bench.tables import alone_table, rate_table

SPREAD = {"median": 0.0912, "p95": 12.34, "min": 0.05, "max": 1234.5, "count": 3}
ROW = {
    "contender": "A",
    "prompt_tokens": 4096,
    "rate": None,
    "requests": 3,
    "failed": 0,
    "ttft_s": SPREAD,
    "tpot_ms": SPREAD,
    "worker_rss_mib": None,
    "device_mib": None,
    "attended": None,
    "reused": None,
}
FASTER = {"ratio": 1.5, "low": 1.25, "high": 1.75, "pairs": 3}
KNOWN = {"worker_rss_mib": 3131.4, "device_mib": 70000.0, "attended": 0.25, "reused": 0.5}


def shown(table) -> list[str]:
    console = Console(width=220, file=StringIO())
    console.print(table)
    return console.file.getvalue().splitlines()


def test_times_have_three_digits_and_ratios_their_interval():
    other = ROW | {
        "contender": "B",
        "faster": {"ttft_s": FASTER, "tpot_ms": FASTER | {"low": None}},
    }
    lines = shown(alone_table([ROW, other]))
    (first,) = [line for line in lines if "│ A " in line]
    (second,) = [line for line in lines if "│ B " in line]
    assert "4,096" in first
    assert "0.0912 (0.05 to 1234)" in first
    assert "1.50x [1.25, 1.75]" in second
    assert "1.50x │" in second


def test_what_nobody_tells_has_no_column():
    assert not any("MiB" in line or "attended" in line for line in shown(alone_table([ROW])))
    lines = shown(alone_table([ROW, ROW | {"contender": "B"} | KNOWN]))
    assert any("worker MiB" in line and "GPU MiB" in line and "attended" in line for line in lines)
    (told,) = [line for line in lines if "│ B " in line]
    assert [cell.strip() for cell in told.strip("│").split("│")][-5:] == [
        *("3131", "70000", "25%", "50%", "0 of 3")
    ]


def test_failures_and_waits_are_shown_and_times_that_are_not_there():
    row = ROW | {"rate": 0.5, "failed": 3, "ttft_s": None, "tpot_ms": None, "waited": 2}
    row |= {"requests_per_s": 0.25, "output_tokens_per_s": 16.04}
    (line,) = [line for line in shown(rate_table([row])) if "│ A " in line]
    cells = [cell.strip() for cell in line.strip("│").split("│")]
    assert cells == ["0.5", "A", "0.25", "16.0", "-", "-", "2 of 3", "3 of 3"]

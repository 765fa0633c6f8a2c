"""Tables of estimated figures, on a terminal and in Markdown."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from vllm_tokenselect.tools.common.tables import Rows, new_table

K = 1024
WIDTH = 180  # of tables that no terminal bounds
LEFT = ("step", "layer", "server", "context")
RIGHT = (
    *("launches", "groups", "programs", "HBM MB", "L2 MB", "Gflop"),
    *("us", "floor us", "FA3 us", "us / FA3"),
)


def wide_console() -> Console:
    """A console whose tables are not squeezed where their output is kept."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def title_of(shape: str) -> str:
    return f"{shape}: a layer, ESTIMATED from counts; nothing was measured"


def cells(result: dict[str, Any]) -> list[str]:
    return [
        result["step"],
        result["layer"],
        "graph" if result["captured"] else "eager",
        f"{result['context'] // K}K",
        *(f"{result[name]:,}" for name in ("launches", "groups", "programs")),
        f"{result['hbm_bytes'] / 1e6:.1f}",
        f"{result['l2_bytes'] / 1e6:.1f}",
        f"{result['tensor_flops'] / 1e9:.1f}",
        *(f"{result[name]:.0f}" for name in ("estimated_us", "floor_us", "fa3_roofline_us")),
        f"{result['estimated_us'] / result['fa3_roofline_us']:.2f}",
    ]


def show(shape: str, results: Rows, console: Console) -> None:
    table = new_table(title_of(shape), LEFT, RIGHT)
    for result in results:
        table.add_row(*cells(result))
    console.print(table)


def show_kernels(results: Rows, console: Console) -> None:
    """What each kernel takes of the layers."""
    table = new_table("Kernels of these layers, ESTIMATED", (*LEFT, "kernel"), ("launches", "us"))
    for result in results:
        for name, kernel in result["kernels"].items():
            taken = f"{kernel['estimated_us']:.1f}"
            table.add_row(*cells(result)[: len(LEFT)], name, str(kernel["launches"]), taken)
    console.print(table)


def show_markdown(shape: str, results: Rows, console: Console) -> None:
    lines = [[*LEFT, *RIGHT], ["---"] * len(LEFT) + ["---:"] * len(RIGHT), *map(cells, results)]
    console.print(f"{title_of(shape)}\n", soft_wrap=True)
    for line in lines:
        console.print(f"| {' | '.join(line)} |", soft_wrap=True, highlight=False, markup=False)

"""Should votes see capped scores where a model caps its attention logits, as Gemma 2 does at 50?

    python -m benchmarks.soft_cap --json benchmarks/results/soft-cap.json

SmolLM2-135M-Instruct reads chapters of the Python documentation, which come with Python, and some of its
layers select for their chunks of queries and for the last single queries: once by votes over scores as
they are, once by votes over capped scores. The table says how much of the *capped* attention of these
queries lies on what they then attend to (sink, selection and local window), and how much of the two
selections is the same. Differences are capped minus raw, with 95 % intervals over texts and layers
(Student's t).
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoTokenizer

from benchmarks.report import write_figures
from vllm_tokenselect.kernels.attend.reference import cap_scores
from vllm_tokenselect.kernels.vote.reference import soft_vote
from vllm_tokenselect.method.settings import Method
from vllm_tokenselect.tools.common.intervals import mean_interval
from vllm_tokenselect.tools.common.smollm2 import ensure_smollm2
from vllm_tokenselect.tools.inspect.model import DiagnosedModel
from vllm_tokenselect.tools.inspect.selections import (
    Chunk,
    attended_positions,
    best,
    causal_scores,
    chunks_of,
    scores,
    spread,
)

TEXTS = ("specialnames", "compound", "types", "formatstrings")
SINGLE = 32  # last tokens, which select for themselves


def arguments(command: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--texts", nargs="+", default=list(TEXTS), help="chapters to read")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of each text")
    parser.add_argument(
        "--caps", type=float, nargs="+", default=[50.0, 30.0, 15.0, 5.0], help="soft caps"
    )
    parser.add_argument(
        "--layers", type=int, nargs="+", default=[0, 4, 9, 14, 19, 24, 29], help="layers"
    )
    parser.add_argument("--top-k", type=int, nargs="+", default=[128, 512], help="tokens selected")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    return parser.parse_args(command)


def vote(
    chunk: Chunk, queries: torch.Tensor, keys: torch.Tensor, scale: float, cap: float | None
) -> torch.Tensor:
    """Positions int64 [top_k] that a chunk's queries [Hq, n, D] select; without a cap, by raw scores.

    The question is another vote than the served one, so this is not `tools/inspect`'s.
    """
    assert chunk.candidates is not None
    mean = queries.mean(dim=1, keepdim=True, dtype=torch.float32)
    places = slice(chunk.candidates.start, chunk.candidates.stop)
    logits = scores(mean, keys[:, places], scale).transpose(0, 1)  # [1, Hq, N]
    votes = soft_vote(logits if cap is None else cap_scores(logits, cap))[0]
    return best(votes, chunk.top_k) + chunk.candidates.start


class Watcher:
    """Compares the two votes in the layers that it is told, while the model attends as it is used to."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._layers, self._caps = args.layers, args.caps
        self._methods = [
            Method(top_k=k, n_init=64, n_local=256, query_chunk=256) for k in args.top_k
        ]
        self.found: list[dict[str, Any]] = []

    def __call__(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> None:
        if layer not in self._layers:
            return
        for method in self._methods:
            for chunk in chunks_of(method, key.shape[1], key.shape[1] - SINGLE):
                if chunk.candidates is not None:
                    self.found += self._compare(method, chunk, layer, query, key, scale)

    def _compare(
        self,
        method: Method,
        chunk: Chunk,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        scale: float,
    ) -> Iterator[dict[str, Any]]:
        own = query[:, chunk.start : chunk.end]
        places = spread(chunk, most=16)
        asking = query[:, places].float()
        logits = causal_scores(asking, places, key[:, : chunk.end], scale)  # [Hq, n, T]
        by_raw = vote(chunk, own, key, scale, None)
        for cap in self._caps:
            by_capped = vote(chunk, own, key, scale, cap)
            shares = cap_scores(logits, cap).masked_fill(logits.isneginf(), -torch.inf).softmax(-1)
            raw, better = (
                float(shares[..., attended_positions(chunk, chosen, method)].sum(-1).mean())
                for chosen in (by_raw, by_capped)
            )
            yield {
                "layer": layer,
                "kind": "single queries" if chunk.end - chunk.start == 1 else "chunks",
                "top_k": method.top_k,
                "cap": cap,
                "raw": raw,
                "capped": better,
                "same": len(set(by_raw.tolist()) & set(by_capped.tolist())) / chunk.top_k,
                "highest": float(logits.max()),
            }


def read_texts(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What was found in every text, layer and chunk."""
    folder = ensure_smollm2()
    model = DiagnosedModel(str(folder), dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for name in track(args.texts, "texts"):
        watcher = Watcher(args)
        model.read(tokenizer(topics[name])["input_ids"][: args.tokens], watcher)
        found += [{"text": name, **one} for one in watcher.found]
    return found


def summarize(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over texts and layers, of which each counts once."""
    cells: dict[tuple[Any, ...], dict[tuple[Any, ...], list[Any]]]
    cells = defaultdict(lambda: defaultdict(list))
    for one in found:
        cells[one["cap"], one["kind"], one["top_k"]][one["text"], one["layer"]].append(one)
    rows = []
    for (cap, kind, top_k), parts in cells.items():
        means = [
            {key: sum(one[key] for one in part) / len(part) for key in ("raw", "capped", "same")}
            for part in parts.values()
        ]
        gain, low, high = mean_interval([part["capped"] - part["raw"] for part in means])
        row: dict[str, Any] = {"cap": cap, "kind": kind, "top_k": top_k}
        row |= {key: sum(p[key] for p in means) / len(means) for key in ("raw", "capped", "same")}
        row |= {"gain": gain, "low": low, "high": high}
        row["largest"] = max((part["capped"] - part["raw"] for part in means), key=abs)
        row["highest"] = max(one["highest"] for part in parts.values() for one in part)
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="capped attention kept by votes over raw and over capped scores")
    for heading in ("cap", "", "top_k", "raw", "capped", "gain (95 %)", "largest", "same"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            f"{row['cap']:g}",
            row["kind"],
            f"{row['top_k']}",
            f"{100 * row['raw']:.2f} %",
            f"{100 * row['capped']:.2f} %",
            f"{100 * row['gain']:+.3f} ({100 * row['low']:+.3f} to {100 * row['high']:+.3f})",
            f"{100 * row['largest']:+.2f}",
            f"{100 * row['same']:.1f} %",
        )
    Console(width=120).print(table)


def main() -> None:
    args = arguments()
    rows = summarize(read_texts(args))
    show(rows)
    write_figures(args.json, args, summary=rows)


if __name__ == "__main__":
    main()

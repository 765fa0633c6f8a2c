"""What the Selection Cache reuses, and what that costs in quality, on real text.

    python -m benchmarks.reuse --json benchmarks/results/reuse.json

SmolLM2-135M-Instruct reads a long text and then goes on word by word with the text's own words, in a
plain PyTorch forward of the method (`tests/oracle`): once with full attention, once selecting for every
token, once reusing selections under each setting. The texts are chapters of the Python documentation,
which come with Python (`pydoc_data`). Divergences are from full attention, given as what they exceed the
divergence of selecting for every token by. Their standard errors are over blocks of 32 tokens.

It is also asked for codes: nine sentences "The code of the ... is 1234." stand in a text, one of them is
asked for, and the model must say it while it reuses selections.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoTokenizer

from benchmarks.report import write_figures
from tests.oracle.model import OracleModel, Selection
from vllm_tokenselect.tools.common.smollm2 import ensure_smollm2

TEXTS = ("specialnames", "compound", "types", "formatstrings", "typesseq", "string-methods")
BLOCK = 32
PLACES = ("lighthouse", "harbour", "mill", "chapel", "archive", "station", "garden", "tower", "inn")
FULL, RESELECT, WINDOW = "full attention", "select for every token", "sink + local only"


@dataclass(frozen=True)
class Policy:
    """A way to decode; `settings` None is full attention."""

    name: str
    settings: Selection | None


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--texts", nargs="+", default=list(TEXTS[:4]), choices=TEXTS, help="chapters to read"
    )
    parser.add_argument("--context", type=int, default=3840, help="tokens read first")
    parser.add_argument("--tokens", type=int, default=224, help="tokens read one by one")
    parser.add_argument("--haystacks", type=int, default=6, help="texts with nine codes each")
    parser.add_argument(
        "--thresholds",
        type=float,
        nargs="+",
        default=[0.95, 0.9, 0.85, 0.8, 0.75, 0.7],
        help="similarity thresholds",
    )
    parser.add_argument("--refresh", type=int, nargs="+", default=[64], help="refresh intervals")
    parser.add_argument("--top-k", type=int, default=512, help="tokens selected")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    return parser.parse_args()


def policies(args: argparse.Namespace) -> list[Policy]:
    """Full attention and selecting for every token first: the others are compared with them."""
    reselect = Selection(
        top_k=args.top_k,
        n_init=64,
        n_local=256,
        query_chunk=256,
        tail_queries=64,
        similarity_threshold=2.0,
        refresh_interval=0,
    )
    found = [Policy(FULL, None), Policy(RESELECT, reselect)]
    window = replace(reselect, top_k=1, n_local=256 + args.top_k)
    found.append(Policy(WINDOW, window))
    for threshold in args.thresholds:
        for refresh in args.refresh:
            name = f"reuse at {threshold}" + (
                f", {refresh} tokens" if len(args.refresh) > 1 else ""
            )
            reuse = replace(reselect, similarity_threshold=threshold, refresh_interval=refresh)
            found.append(Policy(name, reuse))
    return found


class Decoder:
    """Decodes after a prompt that every policy shares: it was read with a selection for every chunk."""

    def __init__(self, model: OracleModel, reading: Selection, prompt: list[int]) -> None:
        self.model, self.prompt = model, prompt
        model.settings = reading
        self.first = model.start(prompt)
        self.cache = list(model.cache)

    @torch.inference_mode()
    def forced(self, policy: Policy, tokens: list[int]) -> tuple[torch.Tensor, float]:
        """Log-probabilities [n, vocabulary] before each token, and the share of selections reused."""
        model = self._restart(policy)
        rows = [self.first]
        for index, token in enumerate(tokens[:-1]):
            rows.append(model.next_logprobs([token], len(self.prompt) + index))
        return torch.stack(rows), model.num_reused / (len(tokens) - 1) / model.num_layers

    @torch.inference_mode()
    def greedy(self, policy: Policy, start: list[int], count: int) -> list[int]:
        """Tokens that the model says after `start`."""
        model = self._restart(policy)
        said: list[int] = []
        for index in range(len(start) + count):
            token = start[index] if index < len(start) else said[-1]
            row = model.next_logprobs([token], len(self.prompt) + index)
            if index >= len(start) - 1:
                said.append(int(row.argmax()))
        return said[:count]

    def _restart(self, policy: Policy) -> OracleModel:
        model = self.model
        model.cache = list(self.cache)
        model.last = [None] * model.num_layers
        model.num_reused = 0
        model.settings = policy.settings or Selection(10**9, 0, 1, 256, 0, 2.0, 0)
        return model


def read_texts(model: OracleModel, tokenizer: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Divergence, loss and reuse of each policy, token by token."""
    ways = policies(args)
    found: dict[str, Any] = {
        way.name: {"reuse": [], "nll": [], "kl": [], "best": []} for way in ways
    }
    for name in track(args.texts, "texts"):
        tokens = tokenizer(topics[name])["input_ids"][: args.context + args.tokens]
        if len(tokens) < args.context + args.tokens:
            sys.exit(f"the chapter {name} has only {len(tokens)} tokens")
        target = torch.tensor(tokens[args.context :])
        decoder = Decoder(model, ways[1].settings, tokens[: args.context])
        full = None
        for way in ways:
            logprobs, reuse = decoder.forced(way, target.tolist())
            full = logprobs if full is None else full
            entry = found[way.name]
            entry["reuse"].append(reuse)
            entry["nll"] += (-logprobs.gather(1, target[:, None])[:, 0]).tolist()
            entry["kl"] += (full.exp() * (full - logprobs)).sum(1).tolist()
            entry["best"] += logprobs.argmax(1).tolist()
    return found


def haystacks(
    tokenizer: Any, args: argparse.Namespace
) -> Iterator[tuple[list[int], dict[str, str]]]:
    """Prompts with nine codes in them, and the codes."""
    for number in range(args.haystacks):
        rng = random.Random(number)
        codes = {place: str(rng.randint(1000, 9999)) for place in PLACES}
        text = topics[TEXTS[number % len(TEXTS)]]
        paragraphs = text[: 3 * args.context].split("\n\n")
        for place, code in codes.items():
            at = rng.randrange(len(paragraphs))
            paragraphs.insert(at, f"The code of the {place} is {code}.")
        yield tokenizer("\n\n".join(paragraphs) + "\n\n")["input_ids"], codes


def ask_for_codes(model: OracleModel, tokenizer: Any, args: argparse.Namespace) -> dict[str, list]:
    """Which codes each policy says when the sentence is begun for it."""
    ways = policies(args)
    found: dict[str, list] = {way.name: [] for way in ways}
    prompts = list(haystacks(tokenizer, args))
    for prompt, codes in track(prompts, "codes"):
        decoder = Decoder(model, ways[1].settings, prompt)
        for place, code in codes.items():
            start = tokenizer(f"As written above: The code of the {place} is")["input_ids"]
            for way in ways:
                said = tokenizer.decode(decoder.greedy(way, start, 6))
                found[way.name].append(said.strip().startswith(code))
    return found


def summarize(texts: dict[str, Any], codes: dict[str, list]) -> list[dict[str, Any]]:
    rows = []
    base = {key: torch.tensor(texts[RESELECT][key]) for key in ("nll", "kl", "best")}
    for name, values in texts.items():
        row: dict[str, Any] = {"policy": name, "reuse": sum(values["reuse"]) / len(values["reuse"])}
        for key in ("kl", "nll"):
            difference = torch.tensor(values[key]) - base[key]
            blocks = difference[: len(difference) // BLOCK * BLOCK].view(-1, BLOCK).mean(1)
            row[key] = float(difference.mean())
            row[f"{key}_se"] = float(blocks.std() / len(blocks) ** 0.5)
        row["same_token"] = float((torch.tensor(values["best"]) == base["best"]).float().mean())
        right = codes.get(name, [])
        row["codes"], row["codes_of"] = sum(right), len(right)
        # A code that both say or neither says tells nothing of the difference.
        pairs = list(zip(codes.get(RESELECT, []), right, strict=True))
        row["codes_lost"] = sum(own and not other for own, other in pairs)
        row["codes_won"] = sum(other and not own for own, other in pairs)
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="differences from selecting for every token (standard error)")
    headings = ("", "reused", "divergence from full", "nats per token", "same token", "codes said")
    for heading in headings:
        table.add_column(heading, justify="left" if not heading else "right")
    for row in rows:
        table.add_row(
            row["policy"],
            f"{100 * row['reuse']:.0f} %",
            f"{row['kl']:+.4f} ({row['kl_se']:.4f})",
            f"{row['nll']:+.4f} ({row['nll_se']:.4f})",
            f"{100 * row['same_token']:.1f} %",
            f"{row['codes']} of {row['codes_of']} (-{row['codes_lost']} +{row['codes_won']})",
        )
    Console(width=150).print(table)


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    folder = ensure_smollm2()
    model = OracleModel(folder, None)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = read_texts(model, tokenizer, args)
    codes = ask_for_codes(model, tokenizer, args)
    rows = summarize(texts, codes)
    show(rows)
    settings = asdict(policies(args)[1].settings)
    write_figures(args.json, args, settings=settings, summary=rows, codes=codes)


if __name__ == "__main__":
    main()

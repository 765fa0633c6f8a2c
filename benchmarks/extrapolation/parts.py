"""The parts of the benchmark: which prompts each one asks, and how their answers are counted."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from rich.table import Table
from transformers import AutoTokenizer

from benchmarks.extrapolation.constructed_model import retrieval_prompts, write_constructed_model
from benchmarks.extrapolation.served import FULL, NATIVE, Asker, trained_length
from benchmarks.report import SMOLLM2
from vllm_tokenselect.tools.common.hidden import (
    ANSWER_TOKENS,
    HiddenPrompt,
    is_right,
    needle_prompts,
    passkey_prompt,
)
from vllm_tokenselect.tools.common.smollm2 import ensure_smollm2
from vllm_tokenselect.tools.evaluate.cells import Cell
from vllm_tokenselect.tools.evaluate.rates import rate_table, rates


class Part(Protocol):
    """What is asked, of which model, and what becomes of the answers."""

    model: Path
    model_name: str

    def cells(self, method: str) -> Iterator[Cell]:
        """Everything that is asked of a method, in an order that lets the prefix cache save work."""

    def ask(self, asker: Asker, cell: Cell) -> dict[str, Any]:
        """The result of a cell."""

    def summarize(self, cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Figures over all cells and their results."""

    def tables(self, summary: list[dict[str, Any]]) -> list[Table]: ...


class _Rates:
    """Parts whose answers are right or wrong."""

    def summarize(self, cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return rates(cells)

    def tables(self, summary: list[dict[str, Any]]) -> list[Table]:
        return [rate_table(summary)]


def lengths_of(method: str, args: argparse.Namespace, trained: int) -> list[int]:
    """The lengths that a method is asked: all, but for those that it cannot serve or takes too long for."""
    limit = {NATIVE: trained, FULL: args.full_up_to}.get(method, max(args.lengths))
    return [length for length in sorted(args.lengths) if length <= limit]


class Constructed(_Rates):
    """The constructed model recalls what followed a key."""

    model_name = (
        "two layers with constructed weights (benchmarks/extrapolation/constructed_model.py)"
    )

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._folder = TemporaryDirectory(prefix="constructed-model-")
        self.model = write_constructed_model(Path(self._folder.name), dtype=args.dtype)

    def cells(self, method: str) -> Iterator[Cell]:
        args = self._args
        for length in lengths_of(method, args, trained_length(self.model)):
            for number in range(ceil(args.samples / args.questions)):
                yield Cell(method, "key", length, number)

    def ask(self, asker: Asker, cell: Cell) -> dict[str, Any]:
        prompts = retrieval_prompts(cell.number, cell.length, self._args.questions)
        said = asker.say_all([prompt.tokens for prompt in prompts], 1)
        return {
            "answers": [
                {
                    "depth": round(prompt.depth, 4),
                    "expected": prompt.answer,
                    "said": tokens[0],
                    "right": tokens == [prompt.answer],
                }
                for prompt, tokens in zip(prompts, said, strict=True)
            ]
        }


class SmolLM2:
    """A real model, trained for 8,192 tokens."""

    model_name = SMOLLM2

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self.model = ensure_smollm2()
        self._tokenizer = AutoTokenizer.from_pretrained(self.model)
        # Its warning about long texts is what this benchmark is about.
        self._tokenizer.model_max_length = 10**9


class Needles(SmolLM2, _Rates):
    """SmolLM2 finds a passkey in noise, and numbers in real text."""

    def cells(self, method: str) -> Iterator[Cell]:
        args = self._args
        for length in lengths_of(method, args, trained_length(self.model)):
            if "facts" in args.tasks:
                for number in range(ceil(args.samples / args.questions)):
                    yield Cell(method, "facts", length, number)
            if "passkey" in args.tasks:
                yield from self._passkeys(method, length)

    def _passkeys(self, method: str, length: int) -> Iterator[Cell]:
        # The deepest first: what stands before a key is then in the cache for all that come later.
        for index in reversed(range(self._args.depths)):
            depth = (index + 0.5) / self._args.depths
            for number in range(ceil(self._args.passkeys / self._args.depths)):
                yield Cell(method, "passkey", length, number, depth)

    def ask(self, asker: Asker, cell: Cell) -> dict[str, Any]:
        prompts = self._prompts(cell)
        said = asker.say_all([prompt.tokens for prompt in prompts], ANSWER_TOKENS)
        texts = [self._tokenizer.decode(tokens) for tokens in said]
        return {
            "answers": [
                {
                    "depth": round(prompt.depth, 4),
                    "expected": prompt.expected,
                    "said": text,
                    "right": is_right(text, prompt.expected),
                }
                for prompt, text in zip(prompts, texts, strict=True)
            ]
        }

    def _prompts(self, cell: Cell) -> list[HiddenPrompt]:
        if cell.depth is None:
            questions = self._args.questions
            return needle_prompts(self._tokenizer, cell.length, cell.number, questions)
        return [passkey_prompt(self._tokenizer, cell.length, cell.depth, cell.number)]

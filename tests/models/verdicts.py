"""What the rounds of `tests.models.rounds` say of a model: in words, for a table."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.forks import HANG
from tests.models.rounds import Answer

TOLERANCE = {"fp32": 1e-3, "bf16": 1e-1}  # of log-probabilities
SHOWN = 230  # characters of a message

_LAYER_TYPES = {
    "full_attention": "full",
    "attention": "full",
    "hybrid": "full",
    "sliding_attention": "sliding window",
    "chunked_attention": "chunked local",
    "linear_attention": "recurrent",
    "mamba": "recurrent",
    "conv": "short convolution",
}


@dataclass
class Outcome:
    """What became of a family.

    Attributes:
        native, reassigned: in words: "equal", "refused", or what is wrong.
        reasons: of the refusals, in the server's own words.
        layers: that stay on vLLM's default backend, and which one.
        notes: what else a reader should know.
        faults: what should not be: hangs, crashes, other answers, a doctor who says something else.
    """

    attention: str
    native: str = ""
    reassigned: str = ""
    reasons: list[str] = field(default_factory=list)
    layers: str = ""
    block_size: int | None = None
    notes: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def judge(folder: Path, said: dict[str, Any], prefix_caching: bool) -> Outcome:
    """Compare what a family's servers said.

    Args:
        folder: of the model.
        said: what CPU_ATTN ("full"), the server with "native" and with "reassigned" positions, and
            "doctor" said.
        prefix_caching: whether they had a prefix cache.
    """
    config = json.loads((folder / "config.json").read_text())
    outcome = Outcome(kind_of_attention(config))
    tolerance = TOLERANCE["bf16" if needs_bf16(config) else "fp32"]
    if needs_bf16(config):
        outcome.notes.append(f"in bf16, within {tolerance}")
    full, native = said["full"], said["native"]
    if "error" in full:
        outcome.notes.append(f"vLLM itself fails on CPUs: {shorten(full['error'])}")
    elif not prefix_caching:
        outcome.notes.append("without prefix caching, with which vLLM itself fails on CPUs")
    for way in ("native", "reassigned"):
        setattr(outcome, way, _judge_way(way, said[way], full, outcome, tolerance))
    if outcome.native != "vLLM itself":  # which fails after what doctor looks at
        _compare_doctor(said["doctor"], native, outcome)
    if "error" not in native:
        outcome.block_size = native["block_size"]
        if differs(native["small"], native["rounds"]["together"], tolerance) is None:
            outcome.notes.append("its answers do not depend on what is selected")
        outcome.layers = "; ".join(
            f"{names.removeprefix('layers ').removeprefix('layer ')}: {runs_on}"
            for names, runs_on in native["layers"]
            if runs_on != "TOKENSELECT"
        )
    return outcome


def _judge_way(
    way: str, said: dict[str, Any], full: dict[str, Any], outcome: Outcome, tolerance: float
) -> str:
    if "error" in said:
        if is_refusal(said["error"]):
            reason = shorten(said["error"])
            if reason not in outcome.reasons:
                outcome.reasons.append(reason)
            return "refused"
        if "error" in full and not said["error"].startswith(HANG):
            return "vLLM itself"
        outcome.faults.append(f"{way}: {shorten(said['error'])}")
        return "**hangs**" if said["error"].startswith(HANG) else "**fails**"
    if "error" in full:
        return "served, compared with nothing"
    rounds = full["rounds"]
    repeats = differs(rounds["again"], rounds["together"], tolerance) is None
    if not repeats and way == "native":
        outcome.notes.append("vLLM itself answers otherwise after a prefix hit")
    for round_, answers in said["rounds"].items():
        if not repeats and round_ != "together":
            continue
        expected = rounds["together" if round_ == "off" else round_]
        difference = differs(answers, expected, tolerance)
        if difference is not None:
            outcome.faults.append(f"{way}, {round_}: {difference}")
            return "**differs**"
    return "equal"


def needs_bf16(config: dict[str, Any]) -> bool:
    """Whether vLLM's CPU kernels of such a model take nothing else: gated DeltaNet."""
    return "linear_num_value_heads" in config.get("text_config", config)


def differs(
    said: Sequence[Answer], expected: Sequence[Answer], tolerance: float = TOLERANCE["fp32"]
) -> str | None:
    """How answers differ; None where they are the same.

    In bf16 two tokens may be as likely as each other, and what follows is another text.
    """
    largest = 0.0
    for number, ((tokens, logprobs), (wanted, wanted_logprobs)) in enumerate(
        zip(said, expected, strict=True)
    ):
        gaps = [abs(a - b) for a, b in zip(logprobs, wanted_logprobs, strict=True)]
        parted = [i for i, (a, b) in enumerate(zip(tokens, wanted, strict=True)) if a != b]
        if parted and (tolerance < TOLERANCE["bf16"] or gaps[parted[0]] > tolerance):
            first = parted[0]
            return (
                f"other tokens for prompt {number} from number {first} on "
                f"(log-probability {gaps[first]:.0e})"
            )
        largest = max(largest, *gaps[: parted[0] + 1 if parted else None])
    return None if largest <= tolerance else f"log-probabilities differ by {largest:.0e}"


def _compare_doctor(doctor: dict[str, Any], server: dict[str, Any], outcome: Outcome) -> None:
    problem = disagreement(doctor, server)
    if problem:
        outcome.faults.append(problem)


def disagreement(doctor: dict[str, Any], server: dict[str, Any]) -> str | None:
    """What doctor says otherwise than the server; None where they agree."""
    if "error" in doctor:
        return f"doctor itself: {shorten(doctor['error'])}"
    if doctor["guess"]:
        return f"doctor guesses: {shorten(doctor['guess'])}"
    if "error" in server:
        if not doctor["refusal"]:
            return f"doctor says nothing of: {shorten(server['error'])}"
        if doctor["refusal"] not in server["error"]:
            return (
                f"doctor says {shorten(doctor['refusal'])}, the server {shorten(server['error'])}"
            )
        return None
    if doctor["refusal"]:
        return f"doctor would refuse it: {shorten(doctor['refusal'])}"
    for asked in ("layers", "block_size", "query_chunk"):
        if doctor[asked] != server[asked]:
            return f"{asked}: doctor says {doctor[asked]}, the server {server[asked]}"
    return None


def is_refusal(error: str) -> bool:
    """Whether an error is a refusal of ours."""
    return "SettingsError" in error or "tokenselect" in error.lower()


def shorten(message: str) -> str:
    """What a message says of the model, in one line."""
    message = " ".join(message.split())
    wrapped = re.search(r"Value error, (.*?) \[type=", message)
    message = wrapped[1] if wrapped else message.removeprefix("SettingsError: ")
    ours = re.match(
        r"(?:TOKENSELECT|tokenselect positions='reassigned') cannot serve \w+: ", message
    )
    if ours:
        message = message[ours.end() :]
        message = re.sub(r"\. Leave (out --attention-backend|positions out).*", "", message)
    return message if len(message) <= SHOWN else message[:SHOWN].rsplit(" ", 1)[0] + " …"


def kind_of_attention(config: dict[str, Any]) -> str:
    """The kinds of a model's layers, and what is special in their attention, of its configuration."""
    config = config.get("text_config", config)
    recurrent = "gated DeltaNet" if "linear_num_value_heads" in config else "Mamba 2"
    names = config.get("layer_types") or config.get("layers_block_type") or ()
    kinds = [_LAYER_TYPES[name] for name in names if name in _LAYER_TYPES]
    kinds = list(dict.fromkeys(recurrent if kind == "recurrent" else kind for kind in kinds))
    if not kinds:
        windowed = config.get("sliding_window") and config.get("use_sliding_window", True)
        kinds = ["sliding window" if windowed else "full"]
    if config["model_type"] in ("mamba", "mamba2", "falcon_mamba"):
        kinds = ["Mamba"]
    if config.get("kv_lora_rank"):
        kinds = ["latent (MLA)" + (", sparse" if config.get("index_topk") else "")]
    rope = config.get("rope_parameters") or {}
    rope_type = rope.get("rope_type", "")
    special = {
        "sinks": config["model_type"] in ("gpt_oss", "granite_swa", "granitemoe_swa"),
        "soft cap": config.get("attn_logit_softcapping"),
        "KV sharing": config.get("num_kv_shared_layers"),
        "ALiBi": config["model_type"] in ("bloom", "mpt") or config.get("alibi"),
        "LongRoPE": rope_type == "longrope",
        "YaRN": rope_type == "yarn",
        "M-RoPE": rope.get("mrope_section"),
    }
    return " + ".join(kinds) + "".join(f", {name}" for name, has in special.items() if has)

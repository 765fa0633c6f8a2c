"""The format of a profile, and its checks.

{"format": 1,
 "settings": {"top_k": 736, "anchor_layers": [2, 6], ...},
 "model": {"name": ..., "layers": 30, "heads": 9, "kv_heads": 3, "head_size": 64, "hidden_size": 576},
 "lost": [{"kind": "text", "nats": 0.001, "low": -0.01, "high": 0.01, "prompts": 4, ...}],
 "note": "...", "versions": {"vllm-tokenselect": ...}, "date": "2026-11-29"}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from vllm_tokenselect.config import TokenSelectConfig
from vllm_tokenselect.method.settings import SettingsError

FORMAT = 1
# Settings that say how a server runs, not what a model needs; and what a profile of a profile would be.
BESIDE = ("profile", "positions", "vote", "workspace_mb", "attention")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ProfileModel(_Strict):
    """A model's shape, as its config.json says it, and its name."""

    name: str
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    hidden_size: int

    @classmethod
    def of(cls, name: str, text_config: Any) -> ProfileModel:
        """The shape of a model of transformers, by the configuration of its text part."""
        heads = text_config.num_attention_heads
        return cls(
            name=last_part(name),
            layers=text_config.num_hidden_layers,
            heads=heads,
            kv_heads=getattr(text_config, "num_key_value_heads", None) or heads,
            head_size=getattr(text_config, "head_dim", None) or text_config.hidden_size // heads,
            hidden_size=text_config.hidden_size,
        )

    def is_shaped_like(self, other: ProfileModel) -> bool:
        return self.shape == other.shape

    @property
    def shape(self) -> str:
        """The shape in words."""
        return (
            f"{self.layers} layers, {self.heads} heads, {self.kv_heads} KV heads, head size "
            f"{self.head_size}, hidden size {self.hidden_size}"
        )


class Lost(_Strict):
    """What the settings added to full attention's loss on one kind of prompt.

    Attributes:
        kind: what the prompts are.
        nats: added to the loss of a generated token, mean over prompts.
        low, high: 95 % interval of it; None for a single prompt.
        prompts: how many.
        prompt_tokens: of the longest prompt.
        tokens: of which the loss was taken, of all prompts.
    """

    kind: str
    nats: float
    low: float | None
    high: float | None
    prompts: int = Field(ge=1)
    prompt_tokens: int = Field(ge=1)
    tokens: int = Field(ge=1)


class Profile(_Strict):
    """Settings for a model, and what they lost.

    Attributes:
        format: version of the format.
        settings: of tokenselect, as `--additional-config` takes them.
        model: whose settings they are.
        lost: on each kind of prompt; empty if nothing was measured.
        note: what else a reader should know.
        versions: of the packages that measured.
        date: of the measurement, ISO 8601.
    """

    format: Literal[1] = 1
    settings: dict[str, Any]
    model: ProfileModel
    lost: list[Lost]
    note: str = ""
    versions: dict[str, str]
    date: str

    @field_validator("settings")
    @classmethod
    def _check_settings(cls, settings: dict[str, Any]) -> dict[str, Any]:
        if beside := [name for name in BESIDE if name in settings]:
            raise ValueError(f"{', '.join(beside)} cannot stand in a profile; give it beside")
        TokenSelectConfig.from_mapping(settings)
        return settings

    def as_json(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=1) + "\n"


def last_part(name: str) -> str:
    """What names a model: the last part of its path or hub name."""
    return Path(name).name


def read_profile(path: Path) -> Profile:
    """Read a profile and check it.

    Raises:
        SettingsError: for a file that is none, naming it and every problem.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"tokenselect profile {str(path)!r} cannot be read: {error}. Give a file that `tokenselect "
            'tune --profile` has written, or "auto".'
        ) from None
    version = content.get("format") if isinstance(content, Mapping) else None
    if version != FORMAT:
        raise SettingsError(
            f"tokenselect profile {str(path)!r} has the format {version!r}; this release reads {FORMAT}. "
            "Write it anew with `tokenselect tune --profile`."
        )
    try:
        return Profile.model_validate(content)
    except ValidationError as error:
        problems = "\n".join(f"  - {_describe(problem)}" for problem in error.errors())
        raise SettingsError(
            f"tokenselect profile {str(path)!r} cannot be used:\n{problems}"
        ) from None


def _describe(problem: Mapping[str, Any]) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"{name}: a profile has no such entry"
    if problem["type"] == "missing":
        return f"{name}: is missing"
    return f"{name}: {problem['msg'].removeprefix('Value error, ')}"

"""Every setting of TokenSelect: its default, its check, and where it is read from."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any, Literal, NamedTuple, cast, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from vllm_tokenselect.method import misplaced
from vllm_tokenselect.method.settings import AnchorLayers, Method, SettingsError

ADDITIONAL_CONFIG_KEY = misplaced.KEY

# On a CPU scores must fit the processor's caches better than they fit memory; on a GPU they should hold
# every row of a step, so that the keys are read once.
DEFAULT_WORKSPACE_MB = {"cpu": 32, "cuda": 512}

# Settings of earlier versions, and what there is instead.
_RETIRED = {"log_requests": "the server's /metrics counts what requests attended to"}


class DescribedSetting(NamedTuple):
    """A setting in words."""

    name: str
    values: str
    default: str
    meaning: str


class TokenSelectConfig(BaseModel):
    """Settings of the selection, read from `--additional-config '{"tokenselect": {...}}'`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    top_k: int = Field(
        default=Method.top_k,
        ge=1,
        description="how many tokens each chunk of queries selects by vote, in every layer",
    )
    n_init: int = Field(
        default=Method.n_init,
        ge=0,
        description="how many tokens at the start of the context are always attended (attention sinks)",
    )
    n_local: int = Field(
        default=Method.n_local,
        ge=1,
        description="how many tokens directly before a chunk are always attended",
    )
    query_chunk: int = Field(
        default=Method.query_chunk,
        ge=1,
        description="most queries of a prompt that select together. The server lowers it where KV blocks "
        "need it (264 with blocks of 528), and the log says so",
    )
    tail_queries: int = Field(
        default=Method.tail_queries,
        ge=0,
        description="how many queries at the end of the prompt select each for itself",
    )
    similarity_threshold: float = Field(
        default=Method.similarity_threshold,
        ge=0,
        description="a generated token reuses the last selection if the cosine of its query with that "
        "selection's query is at least this in every KV head; 1 turns the Selection Cache off",
    )
    refresh_interval: int = Field(
        default=Method.refresh_interval,
        ge=0,
        description="most tokens that may have left the local window since a reused selection was made",
    )
    dense_layers: int = Field(
        default=Method.dense_layers,
        ge=0,
        description="how many of the model's first layers attend to everything, on vLLM's own backend",
    )
    anchor_layers: AnchorLayers = Field(
        default=Method.anchor_layers,
        description="in which layers a generated token selects: all, every n-th of those that select, or "
        "these. In the others it attends to what the anchor below selected. Prompts select in all layers",
        json_schema_extra={"values": '"all" or integer >= 1 or list of layers'},
    )
    min_context: int | Literal["auto"] = Field(
        default="auto",
        description="longest context of which a generated token attends to everything; auto takes "
        "2 * (n_init + top_k + n_local), above which selecting reads less; 0 with reassigned positions",
        json_schema_extra={"values": '"auto" or integer >= 0'},
    )
    vote: Literal["local", "global"] = Field(
        default=Method.vote,
        description="with tensor parallelism: local lets every rank select with its own heads; global lets "
        "all ranks exchange votes in every layer that selects, and select the same tokens",
    )
    positions: Literal["native", "reassigned"] = Field(
        default=Method.positions,
        description="reassigned reads past the trained length: the attended tokens are numbered anew",
    )
    workspace_mb: int = Field(
        default=0,
        ge=0,
        description="memory for scores in MiB; rows are scored in groups that fit it, and no decoding step "
        "of a CUDA graph has more context. 0 takes "
        + " and ".join(f"{mb} on {kind}" for kind, mb in DEFAULT_WORKSPACE_MB.items()),
    )
    attention: Literal["auto", "flash", "xformers", "sdpa"] = Field(
        default="auto",
        description="what attends on a GPU: auto takes the own kernel where rows have few queries, as in "
        "decoding, and otherwise the first library that can; a library is taken for all rows",
    )
    profile: str | None = Field(
        default=None,
        description="file of settings that `tokenselect tune` has found for a model; what is set beside it "
        "overrides it. auto takes the one that ships for the served model, if there is one",
        json_schema_extra={"values": '"auto" or path of a file'},
    )

    @field_validator("anchor_layers", mode="plain")
    @classmethod
    def _check_anchors(cls, value: object) -> AnchorLayers:
        if value == "all" or (type(value) is int and value >= 1):
            return cast(AnchorLayers, value)
        numbers = list(value) if isinstance(value, list | tuple) else []
        if numbers and all(type(number) is int and number >= 0 for number in numbers):
            return tuple(sorted(set(numbers)))
        raise ValueError('must be "all", an integer >= 1, or a list of layer numbers')

    @field_validator("min_context", mode="plain")
    @classmethod
    def _check_min_context(cls, value: object) -> int | Literal["auto"]:
        if value == "auto" or (type(value) is int and value >= 0):
            return value
        raise ValueError('must be "auto" or an integer >= 0')

    @property
    def method(self) -> Method:
        """The settings that define the method."""
        values = {field.name: getattr(self, field.name) for field in fields(Method)}
        if self.min_context == "auto":
            attended = self.n_init + self.top_k + self.n_local
            # To select reads all keys, half of the cache, and then what is attended to.
            values["min_context"] = 0 if self.positions == "reassigned" else 2 * attended
        return Method(**values)

    def workspace_bytes(self, device_type: str) -> int:
        """Memory for the scores of the rows that are voted on together."""
        return (self.workspace_mb or DEFAULT_WORKSPACE_MB[device_type]) << 20

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> TokenSelectConfig:
        """Check `settings` and fill in the defaults.

        Raises:
            SettingsError: with every problem and the list of what is allowed.
        """
        if not isinstance(settings, Mapping):
            raise SettingsError(
                f"tokenselect settings must be a JSON object, got {settings!r}.\n{cls.allowed()}"
            )
        try:
            config = cls.model_validate(dict(settings))
        except ValidationError as error:
            problems = "\n".join(f"  - {_describe(problem)}" for problem in error.errors())
            raise SettingsError(
                f"tokenselect settings cannot be used:\n{problems}\n{cls.allowed()}"
            ) from None
        if config.dense_layers and config.method.reassigns_positions:
            raise SettingsError(
                f"tokenselect dense_layers={config.dense_layers} cannot be used with positions="
                "'reassigned': a layer that attends to everything would see positions that the model "
                "was not trained on. Leave one of them out."
            )
        if config.min_context not in ("auto", 0) and config.method.reassigns_positions:
            raise SettingsError(
                f"tokenselect min_context={config.min_context} cannot be used with positions='reassigned', "
                "which keeps every query within the positions that the model was trained on. Leave one of "
                "them out."
            )
        return config

    @classmethod
    def from_additional_config(cls, additional_config: object) -> TokenSelectConfig:
        """Read the settings out of vLLM's `additional_config`; the keys of others are left alone.

        Raises:
            SettingsError: also for what looks like a setting and would not be read where it stands.
        """
        if additional_config is None:
            return cls()
        if not isinstance(additional_config, Mapping):
            raise SettingsError(
                f"additional_config must be a JSON object with TOKENSELECT, got {additional_config!r}. "
                "Pass settings as --additional-config '{\"tokenselect\": {...}}', or leave it out."
            )
        if wrong := misplaced.find_misplaced(additional_config, cls.model_fields):
            given = ", ".join(f"{name!r}: {additional_config[name]!r}" for name in wrong)
            right = misplaced.corrected(additional_config, cls.model_fields)
            raise SettingsError(
                f"additional_config has {{{given}}} where nothing reads it. Settings of TOKENSELECT "
                f'belong below the key "{ADDITIONAL_CONFIG_KEY}": --additional-config {shlex.quote(right)}'
            )
        return cls.from_mapping(additional_config.get(ADDITIONAL_CONFIG_KEY, {}))

    @classmethod
    def allowed(cls) -> str:
        """The settings with their types, defaults and meaning, one a line."""
        lines = ["Allowed settings (--additional-config '{\"tokenselect\": {...}}'):"]
        for setting in cls.described():
            lines.append("  {}: {}, default {}; {}".format(*setting))
        return "\n".join(lines)

    @classmethod
    def described(cls) -> Iterator[DescribedSetting]:
        """The settings, for messages and for the documentation."""
        for name, field in cls.model_fields.items():
            if isinstance(field.json_schema_extra, dict):
                values = str(field.json_schema_extra["values"])
            elif get_args(field.annotation):
                values = " or ".join(f'"{value}"' for value in get_args(field.annotation))
            else:
                low = next(m.ge for m in field.metadata if hasattr(m, "ge"))
                values = f"{'number' if field.annotation is float else 'integer'} >= {low}"
            yield DescribedSetting(name, values, str(field.default), field.description or "")

    def check_engine(
        self,
        *,
        block_size: int,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        max_num_scheduled_tokens: int | None = None,
        long_prefill_token_threshold: int = 0,
        num_drafts: int = 0,
        steps_end_at_blocks: bool = False,
    ) -> None:
        """Check the settings against the engine that is to use them.

        Args:
            block_size: tokens of a KV block; 1 while vLLM may still choose another.
            max_num_batched_tokens: vLLM's option.
            max_num_seqs: most requests that run at once.
            max_num_scheduled_tokens: vLLM's option; None for as many as are batched.
            long_prefill_token_threshold: vLLM's option; 0 for none.
            num_drafts: most draft tokens of a request in a step.
            steps_end_at_blocks: whether vLLM ends prefill steps at the ends of blocks, since prefixes of
                a hybrid model match inside of them (its option `prefix_match_unit`).

        Raises:
            SettingsError: when a step could not hold a whole chunk beside every running sequence: such a
                prompt would wait for ever.
        """
        chunk = self.method.for_blocks(block_size).query_chunk
        if 0 < long_prefill_token_threshold < chunk:
            raise SettingsError(
                f"long_prefill_token_threshold={long_prefill_token_threshold} would cut query "
                f"chunks of {chunk} tokens. Set it to 0 or to at least {chunk}."
            )
        option, tokens = "max_num_batched_tokens", max_num_batched_tokens
        if max_num_scheduled_tokens is not None and max_num_scheduled_tokens < tokens:
            option, tokens = "max_num_scheduled_tokens", max_num_scheduled_tokens
        whole, held, smaller = (
            "query chunk",
            chunk,
            " or the tokenselect setting query_chunk",
        )
        scheduled = max_num_scheduled_tokens or max_num_batched_tokens
        unsplit = min(scheduled, long_prefill_token_threshold or scheduled)
        if steps_end_at_blocks and held < block_size <= unsplit:
            # vLLM splits a block between steps only where no step could hold it.
            whole, held, smaller = "KV block", block_size, ""
        needed = held + max_num_seqs * (1 + num_drafts)
        if tokens < needed:
            drafts = f", each with {num_drafts} draft tokens" if num_drafts else ""
            raise SettingsError(
                f"{option}={tokens} cannot hold a {whole} of {held} tokens beside "
                f"max_num_seqs={max_num_seqs} running sequences{drafts}. Set "
                f"--{option.replace('_', '-')} to at least {needed}, or lower --max-num-seqs{smaller}."
            )


def _describe(problem: Mapping[str, Any]) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        hint = f" any more; {_RETIRED[name]}" if name in _RETIRED else ""
        return f"{name}: there is no such setting{hint}"
    said = problem["msg"].removeprefix("Value error, ")
    return f"{name} = {problem['input']!r}: {said[0].lower()}{said[1:]}"

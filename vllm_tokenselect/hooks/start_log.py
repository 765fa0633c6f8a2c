"""What a server says of itself at its start: layers, attention, settings. One message of several lines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from vllm_tokenselect import __version__
from vllm_tokenselect.config import ADDITIONAL_CONFIG_KEY, TokenSelectConfig
from vllm_tokenselect.profiles import ProfileSettings


def describe_start(
    vllm_config: Any,
    listed: str,
    num_selecting: int,
    num_layers: int,
    impls: Iterable[Any],
    anchors: Sequence[int],
) -> str:
    """The message.

    Args:
        listed: all layers with what they run on.
        num_selecting: layers that select, of all pipeline stages.
        num_layers: all layers that cache something, of all pipeline stages.
        impls: of the layers of this process that select.
        anchors: numbers of the layers in which generated tokens select; empty for all that select.
    """
    settings = (vllm_config.additional_config or {}).get(ADDITIONAL_CONFIG_KEY, {})
    config = TokenSelectConfig.from_mapping(settings)
    lines = [
        f"TOKENSELECT {__version__} serves {vllm_config.model_config.model}",
        f"  layers that select: {num_selecting} of {num_layers} ({listed})",
    ]
    if anchors:
        lines.append(
            f"  generated tokens select in the layers {', '.join(map(str, anchors))}; in the others they "
            "attend to what the one below selected"
        )
    if ways := sorted({impl.attends_with for impl in impls} - {""}):
        lines.append(f"  attends with {'; '.join(ways)}")
    lines += [
        f"  profile: {settings.source if isinstance(settings, ProfileSettings) else 'none'}",
        f"  settings (* not the default): {_settings(config, vllm_config.device_config.device_type)}",
        f"  {_reach(config, vllm_config.model_config.max_model_len)}",
    ]
    return "\n".join(lines)


def _settings(config: TokenSelectConfig, device_type: str) -> str:
    """Every setting with the value that it takes, as `top_k *1024, n_init 128`."""
    values = config.model_dump(exclude={"profile"})
    values["min_context"] = config.method.min_context
    values["workspace_mb"] = config.workspace_bytes(device_type) >> 20
    others = {
        name
        for name, field in TokenSelectConfig.model_fields.items()
        if getattr(config, name) != field.default
    }
    return ", ".join(f"{name} {'*' * (name in others)}{value}" for name, value in values.items())


def _reach(config: TokenSelectConfig, max_model_len: int) -> str:
    """Up to where nothing is selected."""
    full = _attended_in_full(config)
    return (
        f"attended in full: prompts of up to {full} tokens, and by generated tokens contexts of up to "
        f"{max(config.method.min_context, full)}; --max-model-len is {max_model_len}"
    )


def _attended_in_full(config: TokenSelectConfig) -> int:
    """The longest context of which nothing can be selected, whatever the row is."""
    return config.method.attended_before + 1  # the query itself is one


def why_nothing_selects(vllm_config: Any) -> str:
    """Why no request can be long enough to select on this server; empty if one can."""
    config = TokenSelectConfig.from_additional_config(vllm_config.additional_config)
    full, longest = _attended_in_full(config), vllm_config.model_config.max_model_len
    if longest > full:
        return ""
    return (
        f"TOKENSELECT selects nothing here: contexts of up to {full} tokens are attended in full (n_init + "
        f"top_k + n_local, and the query), and --max-model-len is {longest}. Lower top_k, or serve without "
        "TOKENSELECT."
    )

"""Refuse the model that is being made."""

from __future__ import annotations

from typing import NoReturn

from vllm_tokenselect.method.settings import SettingsError


def refuse_model(*reasons: str) -> NoReturn:
    """Say why TOKENSELECT does not serve the model that is being made.

    Raises:
        SettingsError: always.
    """
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    model_config = config.model_config if config is not None else None
    name = "this model" if model_config is None else model_config.architecture
    raise SettingsError(
        f"TOKENSELECT cannot serve {name}: {'; '.join(reasons)}. Leave out --attention-backend "
        "TOKENSELECT for this model."
    )

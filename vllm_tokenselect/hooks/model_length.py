"""Let a model read more tokens than it was trained on, where positions are reassigned.

vLLM refuses a `--max-model-len` beyond the model's own, for good reason: positions that the model never
saw give nonsense. Reassigned positions stay below that length. With them `EngineArgs.create_model_config`,
which `create_engine_config` calls, runs as if VLLM_ALLOW_LONG_MAX_MODEL_LEN were set. With native positions
vLLM's guard stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vllm_tokenselect.config import TokenSelectConfig
from vllm_tokenselect.engine.log import get_logger
from vllm_tokenselect.hooks.registration import BACKEND_NAME, is_selected
from vllm_tokenselect.hooks.rotary_kinds import reads_only_text
from vllm_tokenselect.hooks.seam import Seam
from vllm_tokenselect.method.settings import SettingsError

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.engine.arg_utils import EngineArgs

SEAM = Seam(
    name="model_length",
    module="vllm.engine.arg_utils",
    qualname="EngineArgs.create_engine_config",
    parameters=("self",),
    contains=("model_config = self.create_model_config()",),
    calls="EngineArgs.create_model_config",
    why="lets a model read past its trained length where positions are reassigned",
    retired_by="vLLM asks the attention backend how long a context may be",
)


@contextmanager
def longer_than_trained(engine_args: EngineArgs) -> Iterator[None]:
    """Lift vLLM's limit while a model configuration is made, if the arguments reassign positions.

    Raises:
        SettingsError: for settings that cannot be used.
    """
    chosen = engine_args.attention_backend
    selected = getattr(chosen, "name", chosen) == BACKEND_NAME
    if not (selected or is_selected(engine_args.attention_config)):
        yield
        return
    config = TokenSelectConfig.from_additional_config(engine_args.additional_config)
    if not config.method.reassigns_positions:
        yield
        return
    from vllm import envs

    # Does what the environment variable of this name would do, for this one moment.
    envs.VLLM_ALLOW_LONG_MAX_MODEL_LEN = True
    try:
        yield
    finally:
        del envs.VLLM_ALLOW_LONG_MAX_MODEL_LEN


def check_trained_length(model_config: ModelConfig, config: TokenSelectConfig) -> None:
    """Check that the positions that will be given lie within what the model was trained on.

    Raises:
        SettingsError: with the settings that would fit.
    """
    method = config.method
    if not method.reassigns_positions:
        return
    if model_config.uses_mrope and not reads_only_text(model_config):
        raise SettingsError(
            f"tokenselect positions='reassigned' cannot serve {model_config.model} with images, whose "
            "positions have several dimensions (M-RoPE): an order of tokens does not give them. Start the "
            "server with --language-model-only, which takes text alone, or leave positions out."
        )
    trained = model_config.get_and_verify_max_len(None)
    if method.max_attended > trained:
        fits = trained - (method.max_attended - method.top_k)
        advice = (
            f"Set top_k to at most {fits}"
            if fits > 0
            else "Set smaller n_init, n_local, query_chunk and top_k"
        )
        raise SettingsError(
            f"tokenselect positions='reassigned' would number up to {method.max_attended} attended tokens "
            f"(n_init {method.n_init} + top_k {method.top_k} + n_local {method.n_local} + query_chunk "
            f"{method.query_chunk}, or refresh_interval {method.refresh_interval}), and "
            f"{model_config.model} was trained on {trained}. {advice}."
        )
    get_logger(__name__).info(
        "TOKENSELECT reassigns positions: %s, trained on %d tokens, reads up to %d. Keys are cached before "
        "their rotation; the tokens that a query attends to, at most %d, are numbered anew. vLLM's "
        "warning about a long max_model_len does not apply.",
        model_config.model,
        trained,
        model_config.max_model_len,
        method.max_attended,
    )


def _create_with_any_length(create_model_config: Any, engine_args: EngineArgs) -> Any:
    with longer_than_trained(engine_args):
        return create_model_config(engine_args)


def install() -> None:
    """Wrap the method; safe to call again."""
    SEAM.wrap(_create_with_any_length)

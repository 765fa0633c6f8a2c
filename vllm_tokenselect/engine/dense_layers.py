"""Which layers the setting `dense_layers` leaves dense, and where there cannot be any."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vllm_tokenselect.config import TokenSelectConfig
from vllm_tokenselect.method.settings import SettingsError


def refuse_to_part(layers: Mapping[str, Any], config: TokenSelectConfig) -> None:
    """Check that no layer that selects reads the cache of a dense layer, which packs keys in its own way.

    Args:
        layers: layers that were made on TOKENSELECT, by name.

    Raises:
        SettingsError: with the largest `dense_layers` that would do.
    """
    from vllm.model_executor.models.utils import extract_layer_index

    targets = {name: layer.kv_sharing_target_layer_name for name, layer in layers.items()}
    readers = {
        target: name for name, target in targets.items() if target and not is_dense(name, config)
    }
    parted = [target for target in readers if is_dense(target, config)]
    if parted:
        target = min(parted, key=extract_layer_index)
        raise SettingsError(
            f"tokenselect dense_layers={config.dense_layers} cannot be used with this model: layer "
            f"{extract_layer_index(readers[target])} selects among the keys and values of layer "
            f"{extract_layer_index(target)}, which would be dense. Set it to at most "
            f"{extract_layer_index(target)}."
        )


def is_dense(layer_name: str, config: TokenSelectConfig) -> bool:
    """Whether the layer is one of those that the settings leave dense."""
    from vllm.model_executor.models.utils import extract_layer_index

    return config.dense_layers > 0 and extract_layer_index(layer_name) < config.dense_layers


def refuse_selecting(layer_names: Iterable[str], config: TokenSelectConfig) -> None:
    """Check that no layer that is to be dense selects.

    Raises:
        SettingsError: when a loader made the model without the function that `layer_backends` wraps.
    """
    wrong = [name for name in layer_names if is_dense(name, config)]
    if wrong:
        raise SettingsError(
            f"tokenselect dense_layers={config.dense_layers} cannot be used with this --load-format, "
            f"which does not load models as vLLM's other loaders do ({wrong[0]} selects). Use another "
            "one, or leave dense_layers out."
        )


def check_model(model_config: Any, cache_config: Any, config: TokenSelectConfig) -> None:
    """Check that layers which select are left, and that the others can be served.

    Raises:
        SettingsError: saying what is allowed.
    """
    if not config.dense_layers:
        return
    from vllm.v1.kv_cache_interface import is_quantized_kv_cache

    layers = model_config.get_total_num_hidden_layers()
    if config.dense_layers >= layers:
        raise SettingsError(
            f"tokenselect dense_layers={config.dense_layers} leaves no layer of {model_config.model} to "
            f"select, which has {layers}. Set it to at most {layers - 1}, or leave out "
            "--attention-backend TOKENSELECT."
        )
    if is_quantized_kv_cache(cache_config.cache_dtype):
        raise SettingsError(
            f"tokenselect dense_layers={config.dense_layers} cannot be used with --kv-cache-dtype "
            f"{cache_config.cache_dtype}: vLLM's backends quantize queries then, which is decided before "
            "a layer is put on one. Leave one of them out."
        )

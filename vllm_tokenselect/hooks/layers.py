"""What a server would do with a model, told by the server's own code, without the model's weights.

    python -m vllm_tokenselect.hooks.layers MODEL [SETTINGS]

makes the configuration of `vllm serve MODEL --attention-backend TOKENSELECT`, and then the model, on
PyTorch's meta device, where tensors have shapes only. Whatever refuses the model in a server refuses it
here. The command prints a `Verdict` as one line of JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from vllm_tokenselect.config import ADDITIONAL_CONFIG_KEY, TokenSelectConfig
from vllm_tokenselect.hooks.registration import BACKEND_NAME

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass
class Verdict:
    """What a server would do.

    Attributes:
        layers: layers with the same backend and kind, as text, and that backend and kind.
        block_size: tokens of a KV block of the layers that select; None if not known.
        query_chunk: queries that select together, which line up with the blocks; None if not known.
        refusal: the message that the server would end with; empty if it would serve.
        guess: why the layers are only guessed from the model's configuration file; empty if they are known.
    """

    layers: list[tuple[str, str]] = field(default_factory=list)
    block_size: int | None = None
    query_chunk: int | None = None
    refusal: str = ""
    guess: str = ""


def examine_model(
    model: str, settings: Mapping[str, Any], options: Mapping[str, Any] | None = None
) -> Verdict:
    """Tell what a server would do with a model. Call it once in a process.

    Args:
        model: the model's folder or hub name.
        settings: tokenselect's.
        options: the server's, by the names of vLLM's `AsyncEngineArgs`; the others have their defaults.
    """
    verdict = Verdict()
    try:
        vllm_config = _make_config(model, settings, options or {})
    except Exception as error:  # whatever it is, the server would not start
        verdict.refusal = _words(error)
        return verdict
    try:
        _make_model(vllm_config)
    except Exception as error:
        # A meta tensor cannot do everything, which says nothing of the model.
        if "meta" in str(error):
            verdict.guess = f"vLLM cannot make this model without its weights: {_words(error)}"
            verdict.layers = guess_layers(vllm_config.model_config.hf_text_config)
        else:
            verdict.refusal = _words(error)
        return verdict
    from vllm_tokenselect.hooks.layer_backends import describe_layers, group_layers

    verdict.layers = group_layers(describe_layers(vllm_config))
    try:
        verdict.block_size = _check_cache(vllm_config)
        method = TokenSelectConfig.from_additional_config(vllm_config.additional_config).method
        # By the blocks that all layers share, as in the server.
        verdict.query_chunk = method.for_blocks(vllm_config.cache_config.block_size).query_chunk
    except Exception as error:
        verdict.refusal = _words(error)
    return verdict


def _make_config(model: str, settings: Mapping[str, Any], options: Mapping[str, Any]) -> VllmConfig:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    arguments = AsyncEngineArgs(
        model=model,
        attention_backend=BACKEND_NAME,
        additional_config={ADDITIONAL_CONFIG_KEY: dict(settings)},
        **options,
    )
    return arguments.create_engine_config(UsageContext.OPENAI_API_SERVER)


def _make_model(vllm_config: VllmConfig) -> None:
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.utils.torch_utils import set_default_torch_dtype

    from vllm_tokenselect.hooks.worker import prepare_for_model

    prepare_for_model(vllm_config)
    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(vllm_config):
        init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
        initialize_model_parallel(1)
    from vllm.model_executor.model_loader.utils import initialize_model

    model_config, devices = vllm_config.model_config, vllm_config.device_config
    device, devices.device = devices.device, torch.device("meta")  # for what asks for it by name
    with set_default_torch_dtype(model_config.dtype), torch.device("meta"), _ones_for_no_data():
        # What decorates it hides its parameters.
        initialize_model(vllm_config=vllm_config, model_config=model_config)  # pyrefly: ignore
    devices.device = device


def _ones_for_no_data() -> Any:
    """Some models read numbers out of a tensor while they are made; any will do."""
    import torch
    from torch.overrides import TorchFunctionMode

    reads = {torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.__float__}

    class OnesForNoData(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func in reads and args[0].is_meta:
                ones = torch.ones(args[0].shape, dtype=args[0].dtype, device="cpu")
                args = (ones, *args[1:])
            return func(*args, **(kwargs or {}))

    return OnesForNoData()


def _check_cache(vllm_config: VllmConfig) -> int:
    """Block size of the layers that select, after checking it as their metadata builder does."""
    from vllm.config import set_current_vllm_config
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.utils import resolve_kv_cache_layout
    from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.worker_base import WorkerBase

    from vllm_tokenselect.engine.kv_cache import check_cache
    from vllm_tokenselect.hooks.layer_backends import describe_layers, selects

    current_platform.update_block_size_for_backend(vllm_config)
    register_all_kvcache_specs(vllm_config)
    worker: Any = SimpleNamespace(vllm_config=vllm_config, shared_kv_cache_layers={})
    block_sizes = []
    with set_current_vllm_config(vllm_config):
        specs = GPUModelRunner.get_kv_cache_spec(worker)
        layouts = WorkerBase.get_supported_kv_cache_layouts(worker)
        resolve_kv_cache_layout(vllm_config, [layouts], specs.values())
        selecting = {layer.name for layer in describe_layers(vllm_config) if selects(layer)}
        for group in _cache_groups(vllm_config, specs):
            for name in selecting.intersection(group.layer_names):
                spec = group.kv_cache_spec
                if isinstance(spec, UniformTypeKVCacheSpecs):
                    spec = spec.kv_cache_specs[name]
                check_cache(spec, name, vllm_config)
                block_sizes.append(spec.block_size)
    return int(max(block_sizes))


def _cache_groups(vllm_config: VllmConfig, specs: dict[str, Any]) -> Any:
    try:  # from 0.33 on
        from vllm.v1.core.kv_cache_planning import (  # pyrefly: ignore
            get_global_kv_cache_groups,
        )
    except ImportError:
        from vllm.v1.core.kv_cache_utils import get_kv_cache_groups  # pyrefly: ignore

        return get_kv_cache_groups(vllm_config, specs)
    return get_global_kv_cache_groups(vllm_config, [specs])


def _words(error: BaseException) -> str:
    """The message of an error, without what pydantic puts around it."""
    problems = error.errors() if hasattr(error, "errors") and callable(error.errors) else []
    for problem in problems:
        inner = problem.get("ctx", {}).get("error")
        if isinstance(inner, BaseException):
            return str(inner)
    known = isinstance(error, (ValueError, OSError, NotImplementedError)) and str(error)
    return str(error) if known else f"{type(error).__name__}: {error}"


def guess_layers(text_config: Any) -> list[tuple[str, str]]:
    """Kinds of layers by the model's configuration file alone."""
    kinds = list(getattr(text_config, "layer_types", None) or ())
    if not kinds:
        windowed = getattr(text_config, "sliding_window", None)
        windowed = windowed and getattr(text_config, "use_sliding_window", True)
        kinds = ["sliding_attention" if windowed else "full_attention"]
        kinds *= text_config.num_hidden_layers
    from vllm_tokenselect.hooks.layer_backends import Layer, group_layers

    return group_layers(
        Layer(str(index), "vLLM's default", kind.replace("_", " "))
        if kind != "full_attention"
        else Layer(str(index), BACKEND_NAME, "")
        for index, kind in enumerate(kinds)
    )


def main(model: str, settings: str = "{}") -> None:
    print(json.dumps(asdict(examine_model(model, json.loads(settings)))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

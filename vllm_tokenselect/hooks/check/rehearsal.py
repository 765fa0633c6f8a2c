"""What a server does with the plugin before it loads a model: `start` runs this beside a release."""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_tokenselect.hooks.registration import BACKEND_NAME

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}

_problems: list[str] = []


def import_modules(machine: str) -> None:
    """Import every module that knows vLLM, but for the other kind of machine."""
    others = "cpu_" if machine == "cuda" else "gpu_"
    for package in ("engine", "backend", "hooks"):
        package = f"vllm_tokenselect.{package}"
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
            if not module.name.startswith(others):
                with _told(f"{package}.{module.name} cannot be imported"):
                    importlib.import_module(f"{package}.{module.name}")


def configure_engine() -> VllmConfig:
    """Make the configuration of `vllm serve MODEL --attention-backend TOKENSELECT`."""
    from vllm.engine.arg_utils import EngineArgs

    with tempfile.TemporaryDirectory() as model:
        Path(model, "config.json").write_text(json.dumps(_MODEL))
        arguments = EngineArgs(
            model=model, skip_tokenizer_init=True, attention_backend=BACKEND_NAME
        )
        return arguments.create_engine_config()


def choose_backend(vllm_config: VllmConfig) -> None:
    """Let vLLM choose the backend of a layer, and see that its classes can be made."""
    from vllm.config import set_current_vllm_config
    from vllm.v1.attention.selector import get_attn_backend

    model = vllm_config.model_config
    for kind, has_sink in (("full-attention layer", False), ("layer with sinks", True)):
        with set_current_vllm_config(vllm_config):
            backend = get_attn_backend(
                model.get_head_size(), model.dtype, "auto", has_sink=has_sink
            )
        if backend.get_name() != BACKEND_NAME:
            _problems.append(f"vLLM chose {backend.get_name()} for a {kind}")
    for made in (backend.get_impl_cls(), backend.get_builder_cls()):
        if missing := sorted(getattr(made, "__abstractmethods__", ())):
            _problems.append(f"{made.__name__} lacks {', '.join(missing)}, which vLLM calls")


def install_hooks() -> None:
    """Install what workers and the scheduler install, on both model runners."""
    from vllm.platforms import current_platform

    from vllm_tokenselect.hooks import (
        chunked_local,
        layer_backends,
        metrics,
        rotary_embedding,
        runner_v1,
        runner_v2,
    )

    steps: tuple[tuple[str, Callable[[], None]], ...] = (
        ("model runner V1", runner_v1.install),
        ("model runner V2", runner_v2.install),
        ("metrics", lambda: metrics.install(current_platform.device_type)),
        ("layers within chunks", chunked_local.install),
        ("the backends of layers", layer_backends.install),
        ("reassigned positions", rotary_embedding.install),
    )
    for name, install in steps:
        with _told(f"the hooks for {name} cannot be installed"):
            install()


@contextmanager
def _told(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        last = traceback.extract_tb(error.__traceback__)[-1]
        _problems.append(
            f"{what}: {type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"
        )


def main(machine: str) -> int:
    from vllm.platforms import current_platform

    if current_platform.device_type != machine:
        _problems.append(f"vLLM found the platform {current_platform.device_type!r}")
    import_modules(machine)
    with _told("the plugin cannot be registered"):
        from vllm_tokenselect.hooks import install_in_every_process

        install_in_every_process()
    with _told("an engine cannot be configured"):
        choose_backend(configure_engine())
    install_hooks()
    for problem in _problems:
        print(f"problem: {' '.join(problem.split())}", flush=True)
    return int(bool(_problems))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

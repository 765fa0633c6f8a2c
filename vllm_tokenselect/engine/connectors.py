"""Which KV connectors are served, and why the others are refused.

Past the first layer, what a block of the KV cache holds depends on the settings. A connector is served if
it tells blocks of different settings apart, and if a test has shown that its loads end where whole query
chunks do (`hooks.connector_loads`).

- `OffloadingConnector`, which `--kv-offloading-size` makes, names blocks by vLLM's block hashes. These
  carry the settings' fingerprint (`hooks.block_hashes`).
- `ExampleConnector` names files by a prompt's tokens alone. It is given a folder for each fingerprint.
- `LMCacheMPConnector` names chunks by a prompt's tokens and a salt. It is given one for each fingerprint
  (`hooks.lmcache_requests`).
- `NixlConnector` names nothing. The server that computed a prompt says with its answer what it computed.
- `MultiConnector` is what its connectors are.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_tokenselect.config import TokenSelectConfig
from vllm_tokenselect.engine.lmcache import LMCACHE, check_lmcache
from vllm_tokenselect.method.request_settings import fingerprint
from vllm_tokenselect.method.settings import SettingsError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

OFFLOADING = "OffloadingConnector"
EXAMPLE = "ExampleConnector"
MULTI = "MultiConnector"
NIXL = ("NixlConnector", "NixlPullConnector")  # two names of one connector

# Where `kv_transfer_params` say what was computed.
HANDED_OVER = "tokenselect"

NO_STREAMS = (
    "streaming input cannot be served with a KV connector (--kv-transfer-config, --kv-offloading-size): "
    "what was offered of a prompt would no longer be its beginning. Send whole prompts, or leave the "
    "connector out"
)

# vLLM's own offloading specs, whose copies run on GPUs only.
_GPU_SPECS = ("CPUOffloadingSpec", "TieringOffloadingSpec")
_CPU_SPEC = "vllm_tokenselect.backend.cpu_offloading"

_BY_TOKENS = (
    "it names blocks by a prompt's tokens alone, and would hand over what other settings computed"
)
_BY_REQUEST = (
    "two servers that agree on a request do not compare TOKENSELECT's settings, and what a prompt's end "
    "computed is handed over with the rest"
)
_UNTRIED = (
    "it names blocks by vLLM's block hashes, as it should, but no test has shown what it does"
)
_REASONS = {
    "LMCacheConnectorV1": f"{_BY_TOKENS}. {LMCACHE} is LMCache's other connector",
    "FlexKVConnectorV1": "a package of its own names its blocks, and knows no settings",
    "HF3FSKVConnector": _BY_TOKENS,
    "NixlPushConnector": "the server that computed a prompt writes all of it, and cannot know where the "
    f"reader's load ends. {NIXL[0]} reads instead",
    "MooncakeConnector": _BY_REQUEST,
    "MoRIIOConnector": _BY_REQUEST,
    "MooncakeStoreConnector": _UNTRIED,
    "SimpleCPUOffloadConnector": f"{_UNTRIED} (unset VLLM_USE_SIMPLE_KV_OFFLOAD)",
    "HiSparseConnector": "it is for models whose own sparse attention takes the place of TOKENSELECT",
    "DecodeBenchConnector": "it fills the cache with made-up numbers",
    "ExampleHiddenStatesConnector": "it carries no KV cache",
}


def check_connectors(vllm_config: VllmConfig, config: TokenSelectConfig, device: str) -> None:
    """Check the KV connectors of an engine, and give those a folder that cannot tell settings apart.

    Raises:
        SettingsError: naming the connector, why it is not served, and what is.
    """
    transfer = vllm_config.kv_transfer_config
    cache = vllm_config.cache_config
    if cache.kv_offloading_size is not None:  # vLLM makes a connector of it after this check
        by_lmcache = cache.kv_offloading_backend == "lmcache"
        simple = os.environ.get("VLLM_USE_SIMPLE_KV_OFFLOAD", "0") not in ("", "0")
        own = "SimpleCPUOffloadConnector" if simple else OFFLOADING
        extra = {} if transfer is None else transfer.kv_connector_extra_config
        _check(vllm_config, config, device, LMCACHE if by_lmcache else own, None, extra)
    else:
        for name, module, extra in _configured(vllm_config):
            _check(vllm_config, config, device, name, module, extra)


def _configured(vllm_config: VllmConfig) -> Iterator[tuple[str, str | None, dict[str, Any]]]:
    """The connectors of `--kv-transfer-config`, as `_leaves`."""
    transfer = vllm_config.kv_transfer_config
    if transfer is not None and transfer.kv_connector is not None:
        yield from _leaves(
            transfer.kv_connector,
            transfer.kv_connector_module_path,
            transfer.kv_connector_extra_config,
        )


def _leaves(
    name: str, module: str | None, extra: dict[str, Any]
) -> Iterator[tuple[str, str | None, dict[str, Any]]]:
    """The connectors that carry something: name, module and the options that they will read."""
    if name != MULTI or module:
        yield name, module, extra
        return
    for child in extra.get("connectors", ()):
        yield from _leaves(
            child.get("kv_connector", ""),
            child.get("kv_connector_module_path"),
            child.setdefault("kv_connector_extra_config", {}),
        )


def _check(
    vllm_config: VllmConfig,
    config: TokenSelectConfig,
    device: str,
    name: str,
    module: str | None,
    extra: dict[str, Any],
) -> None:
    drafts = vllm_config.speculative_config
    if drafts is not None and drafts.method not in ("ngram", "suffix") and name != OFFLOADING:
        raise SettingsError(
            f"the KV connector {name} cannot be used with {drafts.method} drafts (--speculative-config), "
            f"whose layers keep keys of their own: no test has shown what is loaded of them. {OFFLOADING} "
            "works with them. Take it, or leave one of them out."
        )
    if module or name not in (OFFLOADING, EXAMPLE, LMCACHE, *NIXL):
        reason = "it is not vLLM's own, so nothing is known of it" if module else None
        reason = reason or _REASONS.get(name, "nothing is known of it")
        raise SettingsError(
            f"TOKENSELECT does not serve the KV connector {name} (--kv-transfer-config, "
            f"--kv-offloading-size): {reason}. Served are {LMCACHE}, {OFFLOADING}, {EXAMPLE}, {NIXL[0]} "
            f"and {MULTI} with the last three."
        )
    if name == EXAMPLE:
        _check_example(vllm_config)
        _give_folder(vllm_config, config, extra)
    elif name == LMCACHE:
        transfer = vllm_config.kv_transfer_config
        beside_others = transfer is not None and transfer.kv_connector == MULTI
        check_lmcache(vllm_config, extra, beside_others)
    elif name in NIXL:
        if extra.get("bidirectional_kv_xfer"):
            raise SettingsError(
                f"bidirectional_kv_xfer cannot be used with {name} and TOKENSELECT: what a server "
                "generated was not computed in query chunks, so it is not what the other server would "
                "compute. Leave it out of kv_connector_extra_config."
            )
    elif device == "cpu" and extra.get("spec_name", _GPU_SPECS[0]) in _GPU_SPECS:
        raise SettingsError(
            f"{OFFLOADING} (--kv-offloading-size) cannot be used as it is on a CPU: vLLM copies blocks "
            'from and to GPUs only. Set "spec_name": "CpuOffloadingSpec" and "spec_module_path": '
            f'"{_CPU_SPEC}" in kv_connector_extra_config of --kv-transfer-config, which keeps blocks in '
            'host memory and, with "secondary_tiers", in files.'
        )


def _check_example(vllm_config: VllmConfig) -> None:
    """Refuse where vLLM's connector, a debugging aid, would write or read half a prompt.

    Raises:
        SettingsError: naming the option to change.
    """
    scheduler, parallel = vllm_config.scheduler_config, vllm_config.parallel_config
    model = vllm_config.model_config
    wrong = {
        "it writes the first step of a prompt only, so a step has to hold a whole one "
        "(--no-enable-chunked-prefill)": scheduler.enable_chunked_prefill
        or scheduler.long_prefill_token_threshold > 0,
        "its files do not tell block sizes apart (--block-size, the same on every server)": not (
            vllm_config.cache_config.user_specified_block_size
        ),
        "its files do not tell workers apart (--tensor-parallel-size, --pipeline-parallel-size)": (
            parallel.world_size > 1
        ),
        "it keeps no states of hybrid models": model is not None and model.is_hybrid,
    }
    reasons = [reason for reason, present in wrong.items() if present]
    if reasons:
        raise SettingsError(
            f"the KV connector {EXAMPLE} cannot be used with these options: {'; '.join(reasons)}. "
            f"Change them, or take {OFFLOADING}."
        )


def _give_folder(vllm_config: VllmConfig, config: TokenSelectConfig, extra: dict[str, Any]) -> None:
    """Put a folder of its own below `shared_storage_path`; does nothing when it is there already."""
    digest = hashlib.sha256(_what_files_hold(vllm_config, config).encode()).hexdigest()[:16]
    path = Path(extra.get("shared_storage_path", "/tmp"))
    if path.name != f"tokenselect-{digest}":
        extra["shared_storage_path"] = str(path / f"tokenselect-{digest}")


def _what_files_hold(vllm_config: VllmConfig, config: TokenSelectConfig) -> str:
    """All that the bytes of a file depend on, but for the model and its tokens."""
    block_size = vllm_config.cache_config.block_size
    method = config.method.for_blocks(block_size)
    own = fingerprint(method, config.top_k, 1, block_size)
    return f"{own},{number_formats(vllm_config)}"


def number_formats(vllm_config: VllmConfig) -> str:
    """What the bytes of a block depend on beside the model, its tokens and the settings."""
    formats: Mapping[str, object] = {
        "dtype": getattr(vllm_config.model_config, "dtype", None),
        "cache_dtype": vllm_config.cache_config.cache_dtype,
        "device": vllm_config.device_config.device_type,
    }
    return ",".join(f"{name}={value}" for name, value in formats.items())


def asks_for_handed_over(vllm_config: VllmConfig) -> bool:
    """Whether requests of this engine may ask for what another server computed."""
    return any(name in NIXL for name, _, _ in _configured(vllm_config))


def hands_over_requests(connector: object) -> bool:
    """Whether a connector moves a request's blocks, whatever they hold."""
    return type(connector).__name__ in NIXL


def carries_tokens_alone(connector: object) -> bool:
    """Whether a connector names what it holds by a prompt's tokens alone."""
    return type(connector).__name__ == EXAMPLE


def carries_trackers(connector: object) -> bool:
    """Whether a connector is LMCache's, which keeps a tracker for each request."""
    return type(connector).__name__ == LMCACHE

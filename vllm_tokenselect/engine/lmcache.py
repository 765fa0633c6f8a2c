"""What LMCache needs to be served: that it is installed, and which of its options were not tried."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm_tokenselect.method.settings import SettingsError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

LMCACHE = "LMCacheMPConnector"
TESTED = "lmcache==0.5.6"

_UNTRIED = ("lmcache.mp.lazy_offload", "lmcache.mp.transfer_intermediate_tensors")


def check_lmcache(vllm_config: VllmConfig, extra: Mapping[str, Any], beside_others: bool) -> None:
    """Check what LMCache's connector finds.

    Args:
        extra: its options, `kv_connector_extra_config`.
        beside_others: whether it is one of a `MultiConnector`.

    Raises:
        SettingsError: naming what is missing, or the option to change.
    """
    if importlib.util.find_spec("lmcache") is None:
        raise SettingsError(
            f"{LMCACHE} (--kv-transfer-config, --kv-offloading-backend) needs LMCache, which is not "
            f"installed. Install the release that was tested: pip install {TESTED}"
        )
    model = vllm_config.model_config
    reasons = {
        "LMCACHE_USE_UPSTREAM_MP takes vLLM's own copy of it, which runs on GPUs only and was not tried "
        "(unset it)": os.environ.get("LMCACHE_USE_UPSTREAM_MP"),
        "in a MultiConnector it counts tokens as computed that another connector was to load, and stores "
        "what is not there yet (give it alone)": beside_others,
        "no test has shown what it keeps of a hybrid model's states": model is not None
        and model.is_hybrid,
        **{
            f"no test has shown what {name} does (leave it out)": extra.get(name)
            for name in _UNTRIED
        },
    }
    wrong = [reason for reason, present in reasons.items() if present]
    if wrong:
        raise SettingsError(
            f"the KV connector {LMCACHE} cannot be used with these options: {'; '.join(wrong)}."
        )

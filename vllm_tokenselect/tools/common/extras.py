"""The extras of the package: what each brings, and what of it is missing."""

from __future__ import annotations

from importlib.util import find_spec

# The modules that an extra brings. `tests/test_dependencies.py` compares it with pyproject.toml.
EXTRAS = {
    "bench": ("aiohttp", "matplotlib", "psutil", "scipy", "tenacity", "transformers"),
    "demo": ("accelerate", "aiohttp", "gguf", "tenacity", "transformers"),
    "eval": (
        *("aiohttp", "datasets", "lm_eval", "matplotlib", "nltk", "scipy", "tenacity"),
        *("transformers", "wonderwords"),
    ),
    "inspect": ("matplotlib", "scipy", "transformers"),
    "plan": ("transformers", "triton"),
    "verify": ("aiohttp", "tenacity"),
}


def what_is_missing(extra: str) -> str | None:
    """Name the extra's modules that are not installed, and what installs them; None if none is missing."""
    missing = [name for name in EXTRAS[extra] if find_spec(name) is None]
    if not missing:
        return None
    return f"{', '.join(missing)} not installed: pip install 'vllm-tokenselect[{extra}]'"


def vllm_is_missing() -> str | None:
    """Say how to install vLLM; None if it is installed."""
    if find_spec("vllm") is not None:
        return None
    return (
        "vllm not installed: pip install 'vllm-tokenselect[cpu]', or 'vllm-tokenselect[gpu]' on a machine "
        "with a GPU"
    )

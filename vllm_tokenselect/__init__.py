"""Token-level selection of the KV cache for vLLM: `--attention-backend TOKENSELECT`."""

__version__ = "0.1.0"

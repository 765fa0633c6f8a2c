"""Loggers that vLLM's logging configuration reaches: it has handlers for `vllm.*` only."""

from __future__ import annotations

from typing import Any


def get_logger(name: str) -> Any:
    """vLLM's logger (with its `info_once` and `warning_once`) for one of our modules."""
    from vllm.logger import init_logger

    return init_logger(f"vllm.{name}")

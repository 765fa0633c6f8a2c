"""The real model that the tests serve, and Triton's interpreter where there is no GPU."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    # Triton reads it when it is imported, which may be by any of the tests.
    os.environ["TRITON_INTERPRET"] = "1"

from vllm_tokenselect.cli.model import ensure_smollm2

# A hundred thousand steps of each state machine: `make endurance`.
settings.register_profile("endurance", max_examples=1000, stateful_step_count=100)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Servers first: the longest files must not be what is left for one of two processes at the end."""
    items.sort(key=lambda item: item.get_closest_marker("server") is None)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct, converted once into the cache."""
    return ensure_smollm2(progress=False)


@pytest.fixture(scope="session")
def tokenizer(smollm2):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)

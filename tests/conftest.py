"""The real model that the tests serve."""

from pathlib import Path

import pytest

from vllm_tokenselect.cli.model import ensure_smollm2


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct, converted once into the cache."""
    return ensure_smollm2(progress=False)


@pytest.fixture(scope="session")
def tokenizer(smollm2):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)

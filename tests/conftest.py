"""The real model that the tests serve, and Triton's interpreter where there is no GPU."""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it when it is imported, which may be by any of the tests.
    os.environ["TRITON_INTERPRET"] = "1"

from vllm_tokenselect.cli.model import ensure_smollm2


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct, converted once into the cache."""
    return ensure_smollm2(progress=False)


@pytest.fixture(scope="session")
def tokenizer(smollm2):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)

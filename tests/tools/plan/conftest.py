"""No model is looked for on the network, and what is planned is a GPU's memory."""

import os

import pytest

from vllm_tokenselect.kernels.block_table import gpu_digits

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def parts_of_a_gpu(monkeypatch):
    """Not those that suit Triton's interpreter here."""
    monkeypatch.setattr(gpu_digits, "PART_TOKENS", 4096)

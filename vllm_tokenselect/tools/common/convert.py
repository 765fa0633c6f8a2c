"""Convert a GGUF file into a Hugging Face folder; run as a process of its own by `model`.

    python -m vllm_tokenselect.tools.common.convert SOURCE.gguf TARGET_FOLDER

A process of its own, because transformers dequantizes into fp32 first: its memory goes with it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

# What SmolLM2-Instruct was trained with, for a GGUF file that does not carry its chat template.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
END_OF_TURN = "<|im_end|>"


def convert(gguf: Path, target: Path) -> None:
    """Write model (bf16, safetensors), tokenizer and generation settings of `gguf` to `target`.

    Raises:
        ValueError: when the converted model does not answer a simple question sensibly.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    folder, name = str(gguf.parent), gguf.name
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.bfloat16, **_dequantize()
    )
    tokenizer.eos_token = END_OF_TURN
    tokenizer.model_max_length = model.config.max_position_embeddings
    if not tokenizer.chat_template:
        tokenizer.chat_template = CHATML
    # No sampling defaults: a server takes them from here, and a demo should repeat itself.
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    _check(model, tokenizer)
    write(model, tokenizer, target)


def write(model: Any, tokenizer: Any, target: Path) -> None:
    """Write the folder that a server loads. Its files are as readable as the umask leaves new files."""
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    _portable(target / "tokenizer_config.json")
    os.umask(umask := os.umask(0))
    for path in target.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)  # safetensors makes its files for their owner alone


def _dequantize() -> dict[str, Any]:
    """Ask for plain weights, in transformers releases that would keep them quantized."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _check(model: Any, tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    if "Paris" not in answer:
        raise ValueError(f"the converted model answers {answer!r} when asked for France's capital")


def _portable(tokenizer_config: Path) -> None:
    """Drop what only described how this process loaded the tokenizer."""
    content = json.loads(tokenizer_config.read_text(encoding="utf-8"))
    for name in ("is_local", "local_files_only"):
        content.pop(name, None)
    tokenizer_config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))

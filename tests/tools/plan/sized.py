"""Small models and servers to size."""

import json
from pathlib import Path

import torch

from vllm_tokenselect.config import TokenSelectConfig
from vllm_tokenselect.tools.plan.models import ModelShape, read_model
from vllm_tokenselect.tools.plan.planned_server import GPUS, PlannedServer

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}


def tiny_folder(folder: Path, **changed: object) -> Path:
    (folder / "config.json").write_text(json.dumps({**TINY, **changed}))
    return folder


def tiny_model(folder: Path, **changed: object) -> ModelShape:
    return read_model(str(tiny_folder(folder, **changed)))


def server(context: int = 4096, settings: dict[str, object] | None = None, **changed: object):
    given = {
        "gpu": GPUS["h200"],
        "context": context,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 1024,
        "dtype": torch.bfloat16,
        "kv_dtype": torch.bfloat16,
        "weight_bytes": 2.0,
        "config": TokenSelectConfig.from_mapping(settings or {}),
    }
    return PlannedServer(**{**given, **changed})

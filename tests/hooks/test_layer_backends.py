"""Layers are counted, in words, over all stages of a pipeline, before anything is loaded."""

import json
import multiprocessing
import uuid
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from torch import nn

from tests.models.families import GEMMA3
from vllm_tokenselect.hooks import chunked_local, layer_backends, worker
from vllm_tokenselect.hooks.layer_backends import Layer, list_layers
from vllm_tokenselect.hooks.registration import backend_member

WINDOWS = "layers 0-1: CPU_ATTN (sliding window)"


def test_layers_are_listed_in_ranges_by_what_they_run_on():
    layers = [
        Layer(f"model.layers.{n}.self_attn.attn", "CPU_ATTN", "sliding window")
        for n in (0, 1, 2, 5)
    ]
    layers += [
        Layer("model.layers.3.self_attn.attn", "TOKENSELECT", ""),
        Layer("encoder", "X", "y"),
    ]
    assert list_layers(layers) == (
        "layers 0-2, 5: CPU_ATTN (sliding window); layer 3: TOKENSELECT; layer encoder: X (y)"
    )


def make_stages(folders: list[str], rank: int, said: Any) -> None:
    """Make one of two pipeline stages of each model, as a worker does, without weights."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import utils

    for folder in folders:
        try:
            config = EngineArgs(
                model=folder, attention_backend="TOKENSELECT", pipeline_parallel_size=2
            ).create_engine_config()
            worker.prepare_for_model(config)
            if not torch.distributed.is_initialized():
                with set_current_vllm_config(config):
                    init_distributed_environment(2, rank, f"file://{folder}/store", rank, "gloo")
                    initialize_model_parallel(1, 2)
            with torch.device("meta"):
                utils.initialize_model(vllm_config=config)
        except Exception as error:
            said.put((folder, rank, repr(error)))
        else:
            said.put((folder, rank, list_layers(layer_backends.describe_layers(config))))


def test_a_stage_may_have_no_layer_that_selects_if_another_has(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # As an executor names its workers, for what they share in memory.
    monkeypatch.setenv("VLLM_DIST_IDENT", f"stages-{uuid.uuid4().hex}")
    folders = []
    for last in ("full_attention", "sliding_attention"):
        folder = tmp_path / last
        folder.mkdir()
        kinds = ["sliding_attention"] * 3 + [last]
        config = GEMMA3 | {"layer_types": kinds, "dtype": "float32"}
        (folder / "config.json").write_text(json.dumps(config))
        folders.append(str(folder))
    context = multiprocessing.get_context("spawn")
    said = context.Queue()
    stages = [context.Process(target=make_stages, args=(folders, n, said)) for n in (0, 1)]
    for stage in stages:
        stage.start()
    answers = {(f, n): text for f, n, text in (said.get(timeout=240) for _ in range(4))}
    for stage in stages:
        stage.join()
    selecting, windows = folders
    assert answers[selecting, 0] == WINDOWS
    assert answers[selecting, 1] == "layer 2: CPU_ATTN (sliding window); layer 3: TOKENSELECT"
    for rank in (0, 1):
        none = "no layer would select (layers 0-3: CPU_ATTN (sliding window))"
        assert none in answers[windows, rank]


@pytest.fixture
def settled(monkeypatch) -> list[Any]:
    """The calls of `settle_layers` that came through."""
    calls: list[Any] = []
    monkeypatch.setattr(layer_backends, "settle_layers", lambda *args: calls.append(args))
    return calls


def test_a_patched_vllm_settles_layers_once_the_model_is_made(
    load_patched, make_vllm_config, settled
):
    utils = load_patched("vllm/model_executor/model_loader/utils.py")
    config = make_vllm_config()

    class Model(nn.Module):
        def __init__(self, vllm_config: Any, prefix: str) -> None:
            super().__init__()

    model = utils.initialize_model(config, prefix="part", model_class=Model)
    assert settled == [(model, config, config.model_config, "part")]


def test_parts_of_a_model_drafts_and_other_backends_are_left_alone(make_vllm_config):
    """They would be refused: they have no layer at all."""
    config = make_vllm_config()
    layer_backends.settle_layers(nn.Linear(1, 1), config)
    config.attention_config.backend = backend_member()
    layer_backends.settle_layers(nn.Linear(1, 1), config, config.model_config, "language_model")
    layer_backends.settle_layers(nn.Linear(1, 1), config, object())


def test_a_patched_vllm_asks_for_the_backend_of_local_chunks(
    load_patched, make_vllm_config, monkeypatch
):
    from vllm.config import set_current_vllm_config

    module = load_patched("vllm/model_executor/layers/attention/chunked_local_attention.py")

    class Asked(Exception):
        pass

    def choose(*kind: Any) -> None:
        raise Asked(kind)

    monkeypatch.setattr(chunked_local, "choose_backend", choose)
    with set_current_vllm_config(make_vllm_config()), pytest.raises(Asked, match=r"\(32, .*auto"):
        module.ChunkedLocalAttention(2, 32, 1.0, attention_chunk_size=64)


def test_a_patched_worker_prepares_for_the_model(load_patched, make_vllm_config, monkeypatch):
    seen: list[Any] = []
    module = load_patched("vllm/v1/worker/worker_base.py")
    monkeypatch.setattr(worker, "prepare_for_model", seen.append)

    class Worker:
        def init_device(self) -> None:
            seen.append("device")

    wrapper = module.WorkerWrapperBase()
    wrapper.vllm_config, wrapper.worker = make_vllm_config(), Worker()
    wrapper._worker_extension_cls = None
    wrapper.init_device()
    assert seen == [wrapper.vllm_config, "device"]

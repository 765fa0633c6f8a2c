"""Whole vLLM engines with a tiny random model, each in a fork of this process; run by `test_engine.py`.

    python -m tests.gpu.engine FOLDER JOBS.json

A job's `path` is `cpu` or `gpu`. With `gpu` on a machine without one, the layers, the metadata builder and
the Triton kernels of the GPU path serve requests on the CPU, interpreted. Stand-ins are what only a GPU
has: the device itself, vLLM's CUDA kernel that writes keys and values, and the answers to "is this a GPU?".
With `replayed`, decoding steps are cut and sent as for a CUDA graph. With `drafts`, so many are proposed by
n-grams, or as `drafter` says. Prints a line of JSON for each job, a list for each round of its requests:
tokens, log-probability and cached tokens of every answer, and the drafts accepted so far. With `sleep`
there is a third round, after a deep sleep.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.forks import run_in_forks

ENVIRONMENT = {
    "TRITON_INTERPRET": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
BLOCK_SIZE = 32  # the least that vLLM's own layers take on a CPU
SETTINGS = {"top_k": 24, "n_init": 4, "n_local": 16, "query_chunk": 32, "tail_queries": 3}
FAR = 1 << 21  # tokens; a KV cache of 1 GiB holds half as many
N_GRAM = {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 3}


def serve_gpu_path_on_cpu() -> None:
    """Put the GPU path in the backend's place, with stand-ins for what only a GPU has."""
    import torch
    from vllm.v1.attention.backends import fa_utils
    from vllm.v1.kv_cache_interface import KVCacheLayout

    def write(key, value, keys, values, slots, *ignored: Any) -> None:
        written = slots >= 0
        block, offset = slots[written] // keys.shape[1], slots[written] % keys.shape[1]
        keys[block, offset] = key[: len(slots)][written]
        values[block, offset] = value[: len(slots)][written]

    fa_utils.reshape_and_cache_flash = write
    from vllm_tokenselect import backend
    from vllm_tokenselect.backend import gpu_impl, gpu_metadata
    from vllm_tokenselect.gpu import attention

    attention.GATHER_BYTES = 1 << 20
    gpu_impl.choose_library = lambda *arguments, **needs: "sdpa"
    gpu_impl.torch = SimpleNamespace(**vars(torch) | {"device": lambda *name: torch.device("cpu")})
    gpu_impl.torch.cuda = SimpleNamespace(current_device=lambda: 0)
    served = backend.TokenSelectBackend
    served.get_impl_cls = staticmethod(lambda: gpu_impl.GpuTokenSelectImpl)
    served.get_builder_cls = staticmethod(lambda: gpu_metadata.GpuTokenSelectMetadataBuilder)
    # The second only where vLLM's own layers, which are the CPU's here, know no other.
    layouts = (KVCacheLayout.LBNHC, KVCacheLayout.LBHNC)
    served.supported_kv_cache_layouts = classmethod(lambda cls: layouts)


def load_models_into(pool: Any) -> None:
    from vllm.v1.worker.gpu_worker import Worker

    Worker._maybe_get_memory_pool_context = lambda self, tag: pool.loading(tag)


def sleep_and_wake(engine: Any, pool: Any) -> None:
    """What `sleep(level=2)` and `wake_up()` leave of a server whose weights are loaded again."""
    engine.reset_prefix_cache()
    runner = engine.llm_engine.model_executor.driver_worker.worker.model_runner
    model = runner.model
    assert pool.sleep_and_wake([*model.parameters(), *model.buffers()]) > 1 << 20
    for cache in runner.kv_caches:
        cache.fill_(1e3)


def replay_steps() -> None:
    """Schedule and write decoding steps as those that a CUDA graph replays."""
    from vllm_tokenselect.engine import replayed_steps

    replayed_steps.replays_steps = lambda config: True
    from vllm_tokenselect.backend import gpu_metadata

    gpu_metadata.replays_steps = replayed_steps.replays_steps


def accepted_drafts(engine: Any) -> int:
    """Drafts that were accepted so far, by vLLM's own counter."""
    name = "vllm:spec_decode_num_accepted_tokens"
    return sum(metric.value for metric in engine.get_metrics() if metric.name == name)


def serve(
    folder: str,
    path: str,
    settings: dict[str, Any],
    replayed: bool = False,
    drafts: int = 0,
    drafter: dict[str, Any] = N_GRAM,
    max_model_len: int = 512,
    sleep: bool = False,
    rounds: int = 2,
) -> list[Any]:
    from tests.gpu.sleeping import WeightsPool

    pool = WeightsPool()
    if path == "gpu":
        serve_gpu_path_on_cpu()
        load_models_into(pool)
    if replayed:
        replay_steps()
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = {}
    if drafts:
        options["speculative_config"] = {"num_speculative_tokens": drafts, **drafter}
    if max_model_len == -1:
        # The model reads more than the KV cache holds: vLLM lowers the length when layers have buffers.
        options["hf_overrides"] = {"max_position_embeddings": FAR}
    engine = LLM(
        model=folder,
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=max_model_len,
        max_num_batched_tokens=128,
        max_num_seqs=4,
        block_size=BLOCK_SIZE,
        enforce_eager=True,
        disable_log_stats=False,
        attention_backend="TOKENSELECT",
        additional_config={"tokenselect": SETTINGS | settings},
        distributed_executor_backend="uni",
        **options,
    )
    if max_model_len == -1:
        assert 512 < engine.llm_engine.model_config.max_model_len < FAR
    rng = random.Random(0)
    text = [rng.randrange(512) for _ in range(200)]
    prompts = [text[:130], text[:90] + text[10:40], text[70:100], text]  # they share prefixes
    sampling = SamplingParams(
        temperature=0, max_tokens=5, logprobs=1, detokenize=False, ignore_eos=True
    )
    said = []
    for number in range(rounds + sleep):  # the second finds the first in the prefix cache
        if number == rounds:
            sleep_and_wake(engine, pool)
        outputs = engine.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False
        )
        answers = [
            {
                "tokens": list(output.outputs[0].token_ids),
                "logprob": output.outputs[0].cumulative_logprob,
                "cached": output.num_cached_tokens,
                "accepted": accepted_drafts(engine),
            }
            for output in outputs
        ]
        said.append(answers)
    return said


def main(folder: str, jobs: str) -> None:
    os.environ.update(ENVIRONMENT)
    run_in_forks(serve, [{"folder": folder, **job} for job in json.loads(Path(jobs).read_text())])


if __name__ == "__main__":
    main(*sys.argv[1:])

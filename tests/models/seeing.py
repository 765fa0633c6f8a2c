"""Ask tiny models of `tests.models.images` about texts and images."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from tests.models.images import BFLOAT16, PLACEHOLDER, save
from tests.models.processors import FIRST_SPECIAL, ID

QUERY_CHUNK = 32
LONGEST = 1024  # tokens
# Tokens or, in a list, images by their sides in pixels. Images of 100 pixels are 9 to 64 tokens.
TEXT = [70]
PROMPTS = [
    TEXT,
    [30, [100], 60],  # an image over the end of a chunk
    [9, [200], 100],  # larger than a chunk, where images have no fixed size
    [40, [56], 3, [56], 20],  # several in a chunk
]
TOO_LARGE = {"size": {"shortest_edge": 56 * 56, "longest_edge": 10**6}}


def prompt(name: str, parts: list[Any], seed: int = 0) -> dict[str, Any]:
    """A prompt of random tokens and images, as vLLM takes it."""
    import numpy as np
    from PIL import Image

    rng, pixels = random.Random(str(parts)), np.random.default_rng(seed)
    tokens, images = [], []
    for part in parts:
        if isinstance(part, list):
            (side,) = part
            images.append(Image.fromarray(pixels.integers(0, 255, (side, side, 3), np.uint8)))
            tokens += [ID[token] for token in PLACEHOLDER[name]]
        else:
            tokens += [rng.randrange(3, FIRST_SPECIAL) for _ in range(part)]
    made: dict[str, Any] = {"prompt_token_ids": tokens}
    if images:
        made["multi_modal_data"] = {"image": images}
    return made


def answers(
    folder: str, name: str, options: dict[str, Any], prompts: list[Any], too_large: bool = False
) -> dict[str, Any]:
    """Tokens and the sum of their log-probabilities, for all prompts together.

    Returns:
        `said`: for each prompt, and for the last once more with another image.
        `again`: for the prompts again, and `cached`: tokens that were in the prefix cache then.
        `refused`: what is said to an image larger than the encoder's cache, if that is asked.
    """
    from vllm import LLM, SamplingParams
    from vllm.exceptions import VLLMValidationError

    engine = LLM(
        model=str(save(Path(folder), name)),
        dtype="bfloat16" if name in BFLOAT16 else "float32",
        max_num_batched_tokens=128,
        max_num_seqs=4,
        block_size=32,
        max_model_len=LONGEST,
        limit_mm_per_prompt={"image": 2, "video": 0, "audio": 0},
        enforce_eager=True,
        distributed_executor_backend="uni",
        **options,
    )
    sampling = SamplingParams(
        temperature=0, max_tokens=6, logprobs=1, detokenize=False, ignore_eos=True
    )

    def ask(asked: list[dict[str, Any]]) -> list[Any]:
        return engine.generate(asked, sampling, use_tqdm=False)

    def said(outputs: list[Any]) -> list[Any]:
        chosen = [output.outputs[0] for output in outputs]
        return [[list(one.token_ids), one.cumulative_logprob] for one in chosen]

    asked = [prompt(name, parts) for parts in prompts]
    refused = ""
    if too_large:
        large = {**prompt(name, [10, [600], 10]), "mm_processor_kwargs": TOO_LARGE}
        try:
            ask([large])
        except VLLMValidationError as error:  # which a server answers with HTTP 400
            refused = str(error)
    first = said(ask([*asked, prompt(name, prompts[-1], seed=1)]))
    again = ask(asked)
    return {
        "said": first,
        "again": said(again),
        "cached": [output.num_cached_tokens for output in again],
        "refused": refused,
    }

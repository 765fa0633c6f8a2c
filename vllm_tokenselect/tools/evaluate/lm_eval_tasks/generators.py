"""What the YAML files beside this one name: the prompts of a task, and their scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_tokenselect.tools.evaluate.questions import EvalSettings, cells, question
from vllm_tokenselect.tools.evaluate.tasks import TASKS


def dataset(
    name: str,
    max_seq_lengths: Sequence[int] = (4096,),
    samples: int = 100,
    seed: int = 0,
    depths: int = 10,
    **model: Any,
) -> dict[str, Any]:
    """The prompts of a task, in lm-eval's form.

    Args:
        name: of the task.
        max_seq_lengths: tokens of prompt and answer together.
        samples: prompts a length.
        seed: of all prompts.
        depths: of what is hidden, in tasks that choose it.
        model: lm-eval's arguments of the model; its tokenizer is `tokenizer`, `pretrained` or `model`.
    """
    from datasets import Dataset
    from lm_eval.tasks.ruler.common_utils import get_tokenizer, resolve_tokenizer_name
    from transformers import AutoTokenizer

    tokenizer = get_tokenizer(resolve_tokenizer_name(model))
    if tokenizer.chat_template is not None:
        # lm-eval puts prompts into the chat template, if it is asked to. Its tokenizer is its own.
        tokenizer = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
        tokenizer.chat_template = None
    settings = EvalSettings((name,), max_seq_lengths, samples, seed=seed, depths=depths)
    return {
        "test": Dataset.from_list([_row(cell, tokenizer, settings) for cell in cells(settings)])
    }


def _row(cell: Any, tokenizer: Any, settings: EvalSettings) -> dict[str, Any]:
    asked = question(cell, tokenizer, settings, chat=True)
    assert asked.prompt is not None
    begun = asked.prompt.begun
    return {
        "task": cell.task,
        "input": asked.text.removesuffix(begun).rstrip(),
        "gen_prefix": begun.strip(),
        "outputs": list(asked.prompt.expected),
        "max_length": cell.length,
    }


def scores(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """The score of an answer, over all lengths and of its own."""
    score = TASKS[doc["task"]].score(results[0], doc["outputs"])
    return {"score": score, f"score_{doc['max_length']}": score}

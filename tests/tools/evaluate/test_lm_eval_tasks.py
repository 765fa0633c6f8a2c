"""lm-eval itself loads the tasks, and asks what `tokenselect eval` asks."""

import re

import pytest
import yaml
from typer.testing import CliRunner

from vllm_tokenselect.tools.cli.app import app
from vllm_tokenselect.tools.evaluate.lm_eval_tasks import FOLDER
from vllm_tokenselect.tools.evaluate.tasks import TASKS


def test_the_command_prints_the_folder():
    result = CliRunner().invoke(app, ["eval", "--lm-eval-tasks"])
    assert result.exit_code == 0
    assert result.output.strip() == str(FOLDER)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_a_file_with_as_long_an_answer(name):
    found = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    assert found["task"] == f"tokenselect_{name}"
    assert found["dataset_kwargs"] == {"name": name}
    assert found["generation_kwargs"]["max_gen_toks"] == TASKS[name].max_tokens


@pytest.fixture(scope="module")
def loaded(smollm2):
    from lm_eval.tasks import TaskManager

    metadata = {"tokenizer": str(smollm2), "max_seq_lengths": [1000, 1400], "samples": 2}
    manager = TaskManager(include_path=str(FOLDER), include_defaults=False, metadata=metadata)
    names = ["tokenselect_passkey", "tokenselect_vt"]
    return manager.load(names)["tasks"]


def test_lm_eval_makes_prompts_of_the_lengths_with_the_answer_in_them(loaded, tokenizer):
    task = loaded["tokenselect_passkey"]
    docs = list(task.test_docs())
    assert [doc["max_length"] for doc in docs] == [1000, 1000, 1400, 1400]
    for doc in docs:
        (expected,) = doc["outputs"]
        assert doc["input"].count(expected) == 2
        assert doc["input"].endswith("What is the pass key?")
        text = task.doc_to_text(doc) + " " + doc["gen_prefix"]
        size = len(tokenizer.encode(text, add_special_tokens=False))
        assert size == pytest.approx(doc["max_length"] - TASKS["passkey"].max_tokens, abs=4)


def test_lm_eval_scores_answers_as_we_do(loaded):
    task = loaded["tokenselect_vt"]
    doc = next(iter(task.test_docs()))
    half = " ".join(doc["outputs"][:2])
    assert task.process_results(doc, [half]) == {"score": 0.4, f"score_{doc['max_length']}": 0.4}
    assert re.search("they are:$", doc["gen_prefix"])

"""`tokenselect plan` says what a model takes of GPUs, and refuses what it cannot plan in words."""

import json

import pytest
from typer.testing import CliRunner

from tests.tools.plan.sized import tiny_folder
from vllm_tokenselect.tools.cli.app import app


def plan(*arguments: object):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def words(result) -> str:
    return " ".join(result.output.split())


def test_layouts_are_compared_and_one_is_taken():
    result = plan("llama-3.1-8b", "--gpus", "8", "--context", "128K", "--gpu-memory", "h200")
    assert result.exit_code == 0, result.output
    assert "8 x h200: tp 1 x pp 1 x 8 replicas holds 48 contexts at a time" in words(result)
    assert "| weights | 15.0 GiB |" in words(result)
    assert "…" not in result.output


def test_everything_is_written_down_in_bytes(tmp_path):
    file = tmp_path / "new" / "plan.json"
    options = ("--gpus", "1,4", "--context", "2K", "--max-num-seqs", "4", "--json", file)
    result = plan(tiny_folder(tmp_path), *options)
    assert result.exit_code == 0, result.output
    written = json.loads(file.read_text())
    assert [one["gpus"] for one in written["comparisons"]] == [1, 4]
    assert written["server"]["context"] == 2048
    assert written["server"]["config"]["top_k"] == 2048
    (alone,) = written["comparisons"][0]["plans"]
    memory = alone["memory"]
    assert memory["left"] == memory["usable"] - sum(memory["buffers"].values())
    assert memory["kv_token"] == 6 * 2 * 2 * 16 * 2
    assert alone["contexts"] == 4
    assert written["comparisons"][1]["recommended"] == {"tp": 1, "pp": 1, "replicas": 4}


def test_a_model_that_does_not_fit_is_refused_with_what_is_missing(tmp_path):
    file = tmp_path / "plan.json"
    result = plan("llama-3.1-70b", "--gpus", "1", "--context", "128K", "--json", file)
    assert result.exit_code == 2
    assert "llama-3.1-70b does not fit 1 x h200" in words(result)
    assert "52.8 GiB are missing. What would fit: --weights-dtype fp8" in words(result)
    assert json.loads(file.read_text())["comparisons"][0]["plans"][0]["fits"] is False
    assert plan("llama-3.1-70b", "--weights-dtype", "fp8").exit_code == 0
    assert plan("llama-3.1-70b", "--gpus", "2", "--tp", "2", "--pp", "1").exit_code == 0


def test_votes_of_all_gpus_are_paid_for(tmp_path):
    given = ("--gpus", "2", "--tp", "2", "--pp", "1")
    local = plan(tiny_folder(tmp_path), *given, "--context", "8K")
    both = plan(
        tiny_folder(tmp_path), *given, "--context", "8K", "--settings", '{"vote": "global"}'
    )
    assert "| votes | 0 B | 0 B | 0 B |" in words(local)
    assert "| votes | 0 B |" not in words(both)
    assert both.exit_code == 0, both.output


def test_each_setting_is_changed_by_itself(tmp_path):
    given = ("--gpus", "2", "--tp", "2", "--pp", "1", "--context", "1M", "--each-setting")
    result = plan(tiny_folder(tmp_path), *given)
    assert result.exit_code == 0, result.output
    lines = {
        row.split("|")[1].strip(): row.split("|")
        for row in result.output.splitlines()
        if "|" in row
    }
    columns = {words.strip(): i for i, words in enumerate(lines["setting"])}

    def cell(setting: str, column: str) -> str:
        return lines[setting][columns[column]].strip()

    assert cell("similarity_threshold 1", "Selection Cache") == "0 B"
    assert cell("similarity_threshold 1", "reads, reusing") == ""
    assert cell("as given", "Selection Cache") != "0 B"
    assert cell("top_k 4096", "attends to") == "4,737"
    assert cell("as given", "gather buffer") == "0 B"
    assert cell('positions "reassigned"', "gather buffer") != "0 B"
    assert cell('vote "global"', "sends") != cell("as given", "sends")
    few, many = (cell(f"workspace_mb {size}", "scored at a time") for size in (128, 2048))
    assert int(few.replace(",", "")) < int(many.replace(",", ""))


def test_a_context_past_the_trained_length_needs_reassigned_positions(tmp_path):
    folder = tiny_folder(tmp_path)
    result = plan(folder, "--context", "64K")
    assert "was trained on 8,192 tokens: vLLM refuses a context of 65,536" in words(result)
    reassigned = plan(folder, "--context", "64K", "--settings", '{"positions": "reassigned"}')
    assert reassigned.exit_code == 0, reassigned.output
    assert "vLLM refuses" not in words(reassigned)
    settings = '{"positions": "reassigned", "top_k": 8000}'
    refused = plan(folder, "--context", "64K", "--settings", settings)
    assert refused.exit_code == 2
    assert "would number up to 9,152 attended tokens" in words(refused)


REFUSED = {
    "is no number of tokens": ("--context", "128KB"),
    "--gpus 'two': a number of GPUs": ("--gpus", "two"),
    "nor one of a100-40gb": ("--gpu-memory", "h400"),
    "is no JSON": ("--settings", "{"),
    "there is no such setting": ("--settings", '{"topk": 1}'),
    "vote": ("--settings", '{"vote": "none"}'),
    "leaves none of the 6 layers": ("--settings", '{"dense_layers": 6}'),
    "--settings '[]' is no JSON object": ("--settings", "[]"),
    "--dtype 'int8': it must be one of auto": ("--dtype", "int8"),
    "--kv-cache-dtype 'int8': it must be one of auto": ("--kv-cache-dtype", "int8"),
    "--weights-dtype 'tiny': bytes of a weight": ("--weights-dtype", "tiny"),
    "cannot hold a query chunk": ("--max-num-batched-tokens", "512"),
    "is no share": ("--gpu-memory-utilization", "90"),
    "on 1 GPUs: tp 2 x pp 1 takes 2": ("--tp", "2"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_planned_is_refused_in_words(tmp_path, reason):
    result = plan(tiny_folder(tmp_path), "--context", "4K", *REFUSED[reason])
    assert result.exit_code == 2, result.output
    assert reason in words(result)
    assert "Traceback" not in result.output


def test_a_model_that_is_nowhere_is_refused_in_words(tmp_path):
    result = plan(tmp_path / "nothing")
    assert result.exit_code == 2
    assert "nothing" in words(result)


def test_a_profile_is_planned_by_its_settings_and_one_of_another_model_is_refused(tmp_path):
    model = tiny_folder(tmp_path)
    shape = {"layers": 6, "heads": 8, "kv_heads": 2, "head_size": 16, "hidden_size": 128}
    content = {"format": 1, "settings": {"top_k": 300}, "lost": [], "versions": {}}
    content |= {"model": {"name": "tiny", **shape}, "date": "2026-11-29"}
    profile, file = tmp_path / "profile.json", tmp_path / "plan.json"
    profile.write_text(json.dumps(content))
    asked = ("--context", "2K", "--settings", json.dumps({"profile": str(profile)}))
    assert plan(model, *asked, "--json", file).exit_code == 0
    assert json.loads(file.read_text())["server"]["config"]["top_k"] == 300
    profile.write_text(json.dumps({**content, "model": {"name": "big", **shape, "layers": 7}}))
    refused = plan(model, *asked)
    assert refused.exit_code == 2
    assert "is for big (7 layers" in words(refused)

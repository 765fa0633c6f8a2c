"""The diffs fit the installed vLLM and do what the hooks do; what does not fit is told."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")

import torch
import vllm
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig

from vllm_tokenselect.config import SettingsError
from vllm_tokenselect.hooks import all_seams
from vllm_tokenselect.hooks.check import release
from vllm_tokenselect.hooks.check.__main__ import REPOSITORY, main
from vllm_tokenselect.hooks.registration import BACKEND_PATH, backend_member

RELEASE = vllm.__version__.split("+")[0]
INSTALLED = Path(vllm.__file__).parents[1]
DIFFS = sorted((REPOSITORY / "patches" / RELEASE).glob("*.patch"))
RUNNER = "vllm/v1/worker/gpu/model_runner.py"


@pytest.fixture
def released(tmp_path):
    """The files of the installed vLLM that the seams and diffs are about, to be changed."""
    tree = tmp_path / "released"
    names = {seam.module.replace(".", "/") + ".py" for seam in all_seams()}
    for name in names:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(INSTALLED / name, tree / name)
    return tree


@pytest.fixture
def work(tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def test_every_diff_applies_and_makes_its_seams_patched(work):
    report = release.check_release(INSTALLED, DIFFS, work)
    assert report.problems == []
    patched = {name for name, _, _, after in report.lines if after == "patched"}
    assert patched == {diff.stem for diff in DIFFS}
    assert {seam.name for seam in all_seams()} - patched == {"scheduler"}


def test_the_readme_says_for_each_diff_what_would_retire_it_and_what_it_calls():
    text = (REPOSITORY / "patches" / "README.md").read_text()
    rows = {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `")}
    assert rows.keys() == {diff.name for diff in DIFFS}
    for seam in all_seams():
        assert seam.retired_by in rows.get(f"{seam.name}.patch", text)
    for diff in DIFFS:
        imported = re.findall(
            r"^\+\s+from vllm_tokenselect.*import ([a-z_]+)$", diff.read_text(), re.M
        )
        assert not [name for name in imported if f"`{name}`" not in rows[diff.name]]


def applied(tree: Path) -> bool:
    errors = [release.apply_diff(diff, tree) for diff in DIFFS]
    return not any(errors) and "vllm_tokenselect" in (tree / RUNNER).read_text()


@pytest.mark.skipif(not shutil.which("patch"), reason="patch is not installed")
def test_the_diffs_apply_without_git_too(released, monkeypatch):
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "git" else which(name))
    assert applied(released)


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_the_diffs_apply_in_a_folder_of_another_repository(released):
    subprocess.run(["git", "init", "-q", str(released.parent)], check=True)
    assert applied(released)


def test_a_machine_without_git_and_patch_is_told(released, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(release.CheckFailed, match="neither git nor patch is installed"):
        applied(released)


def test_a_patched_registry_has_the_member_from_the_start(load_patched):
    registry = load_patched("vllm/v1/attention/backends/registry.py")
    assert registry.AttentionBackendEnum["TOKENSELECT"].get_path() == BACKEND_PATH


def test_a_patched_platform_chooses_as_the_hook_does(load_patched):
    platform = load_patched("vllm/platforms/cpu.py").CpuPlatform
    full = AttentionSelectorConfig(64, torch.float32, "auto", None)
    windowed = full._replace(has_sliding_window=True)
    own = AttentionBackendEnum.CPU_ATTN.get_path()
    assert platform.get_attn_backend_cls(backend_member(), full) == BACKEND_PATH
    assert platform.get_attn_backend_cls(backend_member(), windowed) == own
    assert platform.get_attn_backend_cls(None, full) == own
    with pytest.raises(ValueError, match="MLA"):
        platform.get_attn_backend_cls(backend_member(), full._replace(use_mla=True))


def test_a_patched_platform_checks_the_settings(load_patched, make_vllm_config):
    platform = load_patched("vllm/platforms/cpu.py").CpuPlatform
    config = make_vllm_config()
    platform.check_and_update_config(config)
    assert config.scheduler_config.scheduler_cls is None
    config.attention_config.backend = backend_member()
    platform.check_and_update_config(config)
    assert config.scheduler_config.scheduler_cls.endswith(".TokenSelectScheduler")
    config.additional_config = {"tokenselect": {"topk": 1}}
    with pytest.raises(SettingsError, match="topk"):
        platform.check_and_update_config(config)


def test_a_release_whose_function_changed_is_told(released, work):
    source = (released / RUNNER).read_text()
    (released / RUNNER).write_text(source.replace("def add_requests(", "def insert_requests("))
    problems = release.check_release(released, DIFFS, work).problems
    assert any("GPUModelRunner.add_requests does not exist" in problem for problem in problems)


def test_a_diff_that_no_longer_fits_is_told(released, work):
    source = (released / RUNNER).read_text()
    (released / RUNNER).write_text(source.replace("import gc\n", "import gc as garbage\n"))
    [problem] = release.check_release(released, DIFFS, work).problems
    assert "runner_v2.patch" in problem
    assert "does not apply" in problem


def test_a_diff_that_calls_what_we_do_not_have_is_told(tmp_path, work):
    diff = tmp_path / "runner_v2.patch"
    original = next(diff for diff in DIFFS if diff.stem == "runner_v2").read_text()
    diff.write_text(original.replace("import add_to_seat", "import add_to_row"))
    problems = release.check_release(INSTALLED, [diff], work).problems
    assert problems == [
        f"{RUNNER}: imports add_to_row from vllm_tokenselect.hooks.runner_v2, "
        "which has no such name"
    ]


def run(*arguments, capsys) -> tuple[int, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_the_command_passes_on_the_installed_release(capsys):
    code, output = run("--version", RELEASE, "--source", INSTALLED, "--no-start", capsys=capsys)
    assert code == 0, output
    assert "Every hook holds, every diff applies, and every name that is used exists." in output
    for seam in all_seams():
        assert seam.target in output


def test_a_release_without_diffs_fails_and_shows_what_the_newest_diffs_give(capsys):
    code, output = run("--version", "0.99.0", "--source", INSTALLED, "--no-start", capsys=capsys)
    assert code == 1
    assert "0.99.0 does not exist; tried the diffs of 0.33.0" in output
    assert "vllm.platforms.cpu:CpuPlatform.get_attn_backend_cls" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--patches", "nowhere"], "The diffs are in the repository, not in the installed package"),
        (["--source", "nowhere"], "holds no `vllm` package"),
    ],
)
def test_what_is_missing_is_said_plainly(arguments, message, capsys, tmp_path):
    arguments[1] = tmp_path / arguments[1]
    code, output = run("--version", RELEASE, *arguments, capsys=capsys)
    assert code == 1
    assert message in output


def test_a_release_that_pip_cannot_get_is_said_plainly(capsys, monkeypatch):
    failed = subprocess.CompletedProcess([], returncode=1)
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: failed)
    code, output = run("--version", RELEASE, capsys=capsys)
    assert code == 1
    assert f"pip could not download vllm=={RELEASE}" in output


def test_the_check_does_not_import_vllm():
    script = (
        "import sys; from vllm_tokenselect.hooks.check.__main__ import main;"
        f"code = main(['--version', {RELEASE!r}, '--source', {str(INSTALLED)!r}, '--no-start']);"
        "sys.exit(code or 'vllm' in sys.modules)"
    )
    child = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr.decode()

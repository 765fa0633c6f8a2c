"""`make gpu-check` runs every step in order, writes results at once, and leaves no process behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu.__main__ import run_steps
from benchmarks.gpu.steps import Step, steps

# Writes a result and a line, starts a child that says its number, and hangs with it.
HANGING = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("partial line, child", child.pid)
open("{file}", "w").write("partial result")
time.sleep(600)
"""


def python(name: str, code: str, seconds: int = 30, **needs) -> Step:
    return Step(name, ("-c", code), seconds, **needs)


def verdicts(folder: Path) -> dict[str, str]:
    found = json.loads((folder / "gpu-check.json").read_text())["steps"]
    return {step["name"]: step["verdict"] for step in found}


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # killed; whoever inherited it has not asked yet


def child_of(log: str) -> int:
    return int(log.partition("partial line, child ")[2].split()[0])


def test_steps_run_in_order_and_verdicts_are_written_before_the_next_begins(tmp_path, capfd):
    read = f"print('it reads', open({str(tmp_path / 'gpu-check.json')!r}).read())"
    todo = [
        python("good", "print('hello')"),
        python("bad", "raise SystemExit(3)"),
        python("absent", "", modules=("no_such_module",)),
        python("no program", "", program="no-such-program"),
        python("reader", read),
    ]
    run_steps(todo, tmp_path, 60)
    assert verdicts(tmp_path) == {
        "good": "pass",
        "bad": "FAIL",
        "absent": "skipped",
        "no program": "skipped",
        "reader": "pass",
    }
    log = (tmp_path / "gpu-check.log").read_text()
    names = [line.removeprefix("== ") for line in log.splitlines() if line.startswith("== ")]
    assert names == ["good", "bad", "reader"]
    written = json.loads(log.partition("it reads ")[2])["steps"]
    assert [step["verdict"] for step in written] == [
        *("pass", "FAIL", "skipped", "skipped", "running")
    ]
    assert "not installed: no_such_module" in (tmp_path / "gpu-check.json").read_text()
    assert "hello" in capfd.readouterr().out


def test_a_step_that_hangs_is_killed_with_its_child_and_the_next_one_runs(tmp_path):
    file = tmp_path / "partial.json"
    todo = [python("hanging", HANGING.format(file=file), 2), python("next", "print('on')")]
    run_steps(todo, tmp_path, 60)
    assert verdicts(tmp_path) == {"hanging": "FAIL", "next": "pass"}
    assert file.read_text() == "partial result"
    log = (tmp_path / "gpu-check.log").read_text()
    assert "on" in log.splitlines()
    assert not is_running(child_of(log))


def test_a_step_that_is_killed_leaves_its_results_and_no_child(tmp_path):
    file = tmp_path / "partial.json"
    dying = HANGING.replace("time.sleep(600)\n", "import os; os.kill(os.getpid(), 9)\n")
    run_steps([python("dying", dying.format(file=file)), python("next", "")], tmp_path, 60)
    assert verdicts(tmp_path) == {"dying": "FAIL", "next": "pass"}
    assert file.read_text() == "partial result"
    assert not is_running(child_of((tmp_path / "gpu-check.log").read_text()))


def test_a_check_that_is_ended_ends_its_step_and_leaves_what_is_known(tmp_path):
    file = tmp_path / "partial.json"
    code = f"""
from pathlib import Path
from benchmarks.gpu import __main__ as check
from benchmarks.gpu.steps import Step
hanging = Step("hanging", ("-c", {HANGING.format(file=file)!r}), 600)
check.steps = lambda *_: [Step("good", ("-c", ""), 9), hanging]
check.main(["--dry", "--results", {str(tmp_path)!r}])
"""
    check = subprocess.Popen([sys.executable, "-c", code])
    end = time.monotonic() + 60
    while not file.exists() and time.monotonic() < end:
        time.sleep(0.05)
    check.send_signal(signal.SIGTERM)
    assert check.wait(30) == 128 + signal.SIGTERM
    assert verdicts(tmp_path) == {"good": "pass", "hanging": "running"}
    assert not is_running(child_of((tmp_path / "gpu-check.log").read_text()))


def test_no_step_is_begun_when_the_time_is_over(tmp_path):
    run_steps([python("slow", "import time; time.sleep(60)"), python("next", "")], tmp_path, 1.5)
    assert verdicts(tmp_path) == {"slow": "FAIL", "next": "skipped"}


def test_the_most_valuable_steps_come_first_and_fit_the_machine():
    todo = steps(Path("results"))
    assert [step.name for step in todo] == [
        "versions and ceilings",
        "first kernels",
        "first kernels, every access checked",
        "attention at 128K",
        "ways to select",
        "whole engines",
        "all other tests",
        "attention from 4K to 1M",
    ]
    assert sum(step.seconds for step in todo[:6]) < 590
    files = {part for step in todo for part in step.arguments if part.startswith("results/")}
    assert len(files) + 2 <= 8


@pytest.mark.endurance
def test_a_dry_run_passes_every_step_without_a_gpu(tmp_path):
    """At tiny sizes kernels agree with their definitions; what needs a GPU is collected."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry", "--results", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    assert set(verdicts(tmp_path).values()) == {"pass"}
    assert list(verdicts(tmp_path)) == [step.name for step in steps(tmp_path)]
    log = (tmp_path / "gpu-check.log").read_text()
    assert log.strip() in done.stdout
    assert re.search(r"test_kernels.py::test_votes.* relative error \S+ of 0.01 PASSED", log)
    assert " failed" not in log
    for name, key in (("device", "ceilings"), ("topk", "results"), ("attention-gpu", "results")):
        assert json.loads((tmp_path / f"{name}.json").read_text())[key]

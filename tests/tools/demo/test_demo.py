"""The demo says what it found, ends with it, and leaves nothing behind, whatever it is shown on."""

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from tests.tools.common.test_server import is_running
from vllm_tokenselect.tools.demo.asking import FULL, OURS, Answer, in_turn
from vllm_tokenselect.tools.demo.document import FACTS, depth, prompt, ships_log
from vllm_tokenselect.tools.demo.figures import Attended
from vllm_tokenselect.tools.demo.verdict import judge

ALL = len(FACTS)
KNOWING = {"ours": ALL, "full": ALL, "figures": True}
ATTENDED = Attended(800, 2000, 12)
CONTROL = re.compile(r"[^\n -~\u00a0-\uffff]")


def command(told: dict) -> list[str]:
    return [sys.executable, "-m", "tests.tools.demo.stand_in", json.dumps(told), "demo"]


def environment(tmp_path: Path, **changes: str) -> dict[str, str]:
    """This one's, with a temporary folder of the demo's own."""
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    return {**kept, "TMPDIR": str(tmp_path), "TERM": "xterm-256color", **changes}


def run_demo(told: dict, tmp_path: Path) -> subprocess.CompletedProcess:
    env = environment(tmp_path)
    return subprocess.run(command(told), env=env, capture_output=True, text=True, timeout=60)


def on_terminal(told: dict, env: dict[str, str]) -> tuple[str, int]:
    """What the demo writes on a terminal, and its exit status."""
    leader, follower = pty.openpty()
    demo = subprocess.Popen(
        command(told), env=env, stdin=follower, stdout=follower, stderr=follower
    )
    os.close(follower)
    written = b""
    while True:
        try:
            written += os.read(leader, 65536)
        except OSError:  # Linux's way to say that nobody writes any more
            break
    os.close(leader)
    return written.decode().replace("\r\n", "\n"), demo.wait(60)


@pytest.mark.usefixtures("smollm2")
class TestRun:
    def test_each_answer_stands_beside_its_time_and_its_tokens(self, tmp_path):
        done = run_demo(KNOWING, tmp_path)
        for fact in FACTS:
            assert fact.question in done.stdout
        row = rf"{FACTS[0].answer} +right +\d+\.\d\d s +1,000 +"
        assert done.returncode == 0
        assert re.search(rf"TOKENSELECT +{row}200 of 501 tokens", done.stdout)
        assert re.search(rf"full attention +{row}501 of 501 tokens", done.stdout)
        # The log is read twice each way, and found in the prefix cache by the other requests.
        reads = re.findall(r" s +([\d,]+) +\d+ of \d+ tokens\n", done.stdout)
        assert (reads.count("1,000"), reads.count("10")) == (4, 2 * ALL - 4)
        for what in ("reading the log", "with the log in the prefix cache"):
            assert re.search(rf"{what}: \d+\.\d\d s and \d+\.\d\d s \(\d+\.\d\dx\)", done.stdout)
        assert (
            "attended to 40% of the tokens in context where it read the log, and to 40%"
            in done.stdout
        )

    def test_a_demo_that_fails_says_why_and_where_the_log_is(self, tmp_path):
        done = run_demo({**KNOWING, "ours": ALL - 2}, tmp_path)
        assert done.returncode == 1
        assert done.stdout.count("wrong") == 2
        assert "TOKENSELECT lost more than one answer." in done.stdout
        assert [str(path) for path in tmp_path.iterdir()] == [done.stdout.split()[-1]]

    def test_status_is_1_without_the_servers_figures(self, tmp_path):
        done = run_demo({**KNOWING, "figures": False}, tmp_path)
        assert done.returncode == 1
        assert "/metrics does not say what the question attended to: " in done.stdout
        assert FACTS[0].question in done.stdout
        assert "Asking, " not in done.stdout  # the bar of a demo that broke off

    def test_a_pipe_gets_plain_lines(self, tmp_path):
        done = run_demo(KNOWING, tmp_path)
        assert not CONTROL.search(done.stdout + done.stderr)
        assert "\nStarting vLLM: API ready\n" in done.stdout
        assert "━" not in done.stdout
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("changes", [{"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=str)
    def test_a_terminal_without_color_gets_plain_lines(self, changes, tmp_path):
        written, status = on_terminal(KNOWING, environment(tmp_path, **changes))
        assert status == 0
        assert not CONTROL.search(written), written
        assert "\nStarting vLLM: API ready\n" in written
        assert "━" not in written

    def test_a_terminal_gets_colors_and_bars(self, tmp_path):
        written, status = on_terminal(KNOWING, environment(tmp_path))
        assert status == 0
        assert "\x1b[32mright" in written
        assert "Asking, full attention" in written

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    def test_an_interrupt_leaves_neither_server_nor_files(self, number, tmp_path):
        told = {**KNOWING, "hangs": True}
        output = tmp_path / "output"
        with output.open("w") as file:
            demo = subprocess.Popen(
                command(told),
                env=environment(tmp_path),
                stdout=file,
                stderr=file,
                # The tests may run in the background, where a shell has some of them ignored.
                preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
            )
        wait_until(lambda: "depth" in output.read_text())
        started = children_of(demo.pid)  # the server, and who watches it
        assert started
        for _ in range(3):  # an impatient user
            demo.send_signal(number)
            time.sleep(0.2)
        assert demo.wait(30) != 0
        assert not [pid for pid in started if is_running(pid)]
        assert [path.name for path in tmp_path.iterdir()] == ["output"]


def wait_until(is_so, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "it never was"
        time.sleep(0.1)


def children_of(pid: int) -> list[int]:
    """The processes that another one started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_every_question_is_asked_both_ways_and_neither_goes_first_twice_in_a_row():
    asked = list(in_turn(FACTS))
    assert len({(fact, way) for _, fact, way in asked}) == len(asked) == 2 * ALL
    ways = [way for *_, way in asked]
    assert ways[:8] == [OURS, FULL, FULL, OURS] * 2
    assert ways[8:] == [FULL, OURS, OURS, FULL] * 2
    # So the log is read A B B A.
    first = [next(i for i, a in enumerate(asked) if a[0] == n) for n in (0, 1)]
    assert [ways[i + j] for i in first for j in (0, 1)] == [OURS, FULL, FULL, OURS]


@pytest.mark.parametrize(
    ("text", "is_right"),
    [(" 4817", True), (" 4817 feet", True), (" 48170", False), (" not 4817", False), ("", False)],
)
def test_an_answer_is_right_when_it_begins_with_the_documents(text, is_right):
    fact = next(fact for fact in FACTS if fact.answer == "4817")
    assert Answer(fact, OURS, text, 1.0, 10, ATTENDED).is_right == is_right


@pytest.mark.parametrize(
    ("found", "found_full", "status"),
    [(8, 8, 0), (7, 8, 0), (6, 8, 1), (8, 6, 0), (3, 4, 0), (3, 3, 1), (0, 0, 1)],
)
def test_status_is_0_with_as_many_answers_as_full_attention_less_one(found, found_full, status):
    answers = [
        Answer(fact, way, fact.answer if number < right else "?", 1.0, 10, ATTENDED)
        for way, right in ((OURS, found), (FULL, found_full))
        for number, fact in enumerate(FACTS)
    ]
    written = io.StringIO()
    assert judge(answers, Console(file=written)) == status
    assert f"found {found} of {ALL}, full attention {found_full}." in written.getvalue()


def test_each_fact_stands_once_and_the_document_is_always_the_same():
    text = ships_log()
    for fact in FACTS:
        assert text.count(fact.begun) == text.count(fact.sentence) == 1
    assert text == ships_log()


def test_facts_stand_all_over_the_document_and_outside_of_what_is_always_attended(tokenizer):
    from vllm_tokenselect.tools.demo.command import SETTINGS

    depths = [depth(fact) for fact in FACTS]
    assert len(FACTS) >= 8
    assert depths == sorted(depths)
    assert depths[0] < 0.1
    assert depths[-1] > 0.9
    for fact in FACTS:
        before, after = prompt(fact).split(fact.sentence)
        assert len(tokenizer.encode(before)) > SETTINGS["n_init"]
        assert len(tokenizer.encode(after)) > SETTINGS["n_local"] + 64


def test_the_document_has_six_thousand_tokens_and_fits_the_model_with_its_question(tokenizer):
    assert len(tokenizer.encode(ships_log())) >= 6000
    assert max(len(tokenizer.encode(prompt(fact))) for fact in FACTS) < 8192 - 64

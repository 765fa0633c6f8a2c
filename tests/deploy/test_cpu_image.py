"""The commands of the CPU image, one after the other in a new environment, end in a server that answers.

Not a container: `RUN` of the stages `wheel` and `cpu` goes to a shell, with folders of the image below a
temporary one and Debian's packages taken from this machine.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import openai
import pytest

from tests.deploy.dockerfile import command, environment, stages, values
from tests.deploy.tools import REPOSITORY
from vllm_tokenselect.tools.common.server import free_port
from vllm_tokenselect.tools.common.watcher import watch_group

# Of the image, and of this machine: made by hand, or there already.
LEFT_OUT = ("apt-get", "useradd")


@pytest.fixture
def image(tmp_path):
    """Folder that stands for the image's root, and the variables of a shell in it."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    variables = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
    variables |= {name: os.environ[name] for name in os.environ if name.startswith("PIP_")}
    variables["PATH"] = f"{venv / 'bin'}:{os.environ['PATH']}"
    return tmp_path, variables


def inside(root: Path, text: str) -> str:
    """`text` with the image's folders below `root`."""
    for folder in ("/dist", "/opt/models", "/src/constraints"):
        text = text.replace(folder, f"{root}{folder}")
    return text


def build(root: Path, variables: dict[str, str]) -> None:
    """Do what the stages `wheel` and `cpu` do with the repository's files and in a shell."""
    source = root / "src"
    source.mkdir()
    for instruction in values("wheel", "COPY"):
        for name in instruction.split()[:-1]:
            copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
            copy(REPOSITORY / name, source / name)
    for stage, folder in (("wheel", source), ("cpu", root)):
        for step in stages()[stage]:
            words = step.value.split()
            if step.name == "RUN" and words[0] not in LEFT_OUT:
                script = " ".join(word for word in words if not word.startswith("--mount="))
                subprocess.run(
                    inside(root, script), shell=True, check=True, cwd=folder, env=variables
                )


@pytest.mark.endurance
@pytest.mark.server
def test_the_commands_of_the_cpu_image_end_in_a_server_that_answers(image):
    root, variables = image
    build(root, variables)
    port = free_port()
    arguments = shlex.split(inside(root, shlex.join(command("cpu"))))
    server = subprocess.Popen(
        [*arguments, "--host", "127.0.0.1", "--port", str(port)],
        cwd=root,
        env=variables | environment("cpu"),
        executable=root / "venv/bin/vllm",
        start_new_session=True,
    )
    watcher = watch_group(server.pid)
    try:
        client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0
        )
        answer = wait_for_answer(client, server)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)
        watcher.dismiss()
    assert "Paris" in answer


def wait_for_answer(client: openai.OpenAI, server: subprocess.Popen, seconds: float = 900) -> str:
    """The answer to a question, as soon as the server gives one."""
    question = {"role": "user", "content": "What is the capital of France?"}
    deadline = time.monotonic() + seconds
    while True:
        assert server.poll() is None, f"vllm serve ended with status {server.returncode}"
        assert time.monotonic() < deadline, f"no answer within {seconds:.0f} s"
        try:
            completion = client.chat.completions.create(
                model="smollm2-135m-instruct", messages=[question], temperature=0, max_tokens=32
            )
        except openai.APIConnectionError:
            time.sleep(1)
        else:
            return completion.choices[0].message.content

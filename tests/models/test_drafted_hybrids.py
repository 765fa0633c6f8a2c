"""What a hybrid model's own layer drafts changes nothing that is said, but for ties that bf16 rounds."""

import json
import subprocess
import sys

import pytest

from tests.models.drafted import GENERATED, LENGTHS
from tests.models.families import FAMILIES
from tests.models.heads import echo_tokens, save_qwen3_next

pytestmark = [pytest.mark.server, pytest.mark.endurance]

COVERING, SPARSE = 4096, 24
# Logits of 8 to 16 are bf16 numbers 1/16 apart, and vLLM's kernels for drafts round otherwise than those
# for one token. Tokens whose log-probabilities are nearer than this may take each other's place.
TIE = 0.25


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> dict[tuple, dict]:
    """By backend, `top_k` and drafts: what is said, and how many drafts are accepted."""
    folder = tmp_path_factory.mktemp("hybrid")
    options = {**FAMILIES["Qwen3-Next"][1], "max_position_embeddings": 2048}
    model = echo_tokens(save_qwen3_next(folder / "model", options))
    names = ("backend", "top_k", "drafts")
    ways = [("CPU_ATTN", COVERING), ("TOKENSELECT", COVERING), ("TOKENSELECT", SPARSE)]
    jobs = [dict(zip(names, (*way, drafts), strict=True)) for way in ways for drafts in (0, 2)]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "tests.models.drafted", str(model), str(folder / "jobs.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    answers = [json.loads(line) for line in done.stdout.splitlines() if line[:1] == "{"]
    assert len(answers) == len(jobs), done.stdout[-3000:] + done.stderr[-3000:]
    assert not any("error" in one for one in answers), done.stdout[-3000:] + done.stderr[-3000:]
    return {tuple(job.values()): one for job, one in zip(jobs, answers, strict=True)}


def tokens_of(answer: dict) -> list[list[int]]:
    return [tokens for tokens, _ in answer["said"]]


@pytest.mark.parametrize("top_k", [COVERING, SPARSE])
def test_drafts_are_accepted_and_change_nothing_but_ties(served, top_k):
    without, drafted = (served["TOKENSELECT", top_k, drafts] for drafts in (0, 2))
    assert 0 < drafted["accepted"] < drafted["drafted"]
    same = 0
    for (expected, leads), (actual, _) in zip(without["said"], drafted["said"], strict=True):
        pairs = zip(expected, actual, strict=True)
        parted = next((i for i, (one, other) in enumerate(pairs) if one != other), None)
        assert parted is None or leads[parted] < TIE
        same += GENERATED if parted is None else parted
    assert same > len(LENGTHS) * GENERATED / 2


def test_with_drafts_a_budget_that_covers_the_context_says_what_vllms_own_backend_says(served):
    own, ours = (served[name, COVERING, 2] for name in ("CPU_ATTN", "TOKENSELECT"))
    assert tokens_of(ours) == tokens_of(own)
    assert ours["accepted"] == own["accepted"]


def test_selecting_matters(served):
    selecting, covering = (served["TOKENSELECT", top_k, 2] for top_k in (SPARSE, COVERING))
    assert tokens_of(selecting) != tokens_of(covering)

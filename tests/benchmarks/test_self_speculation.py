"""A model that drafts for itself says what it says by itself, and its drafts attend to what is said."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.self_speculation.attention import N_INIT, DraftAttention, attend_in_full
from benchmarks.self_speculation.decoding import Sequence, decode, speculate
from vllm_tokenselect.tools.inspect.model import DiagnosedModel

PROMPT = torch.randint(300, (160,), generator=torch.Generator().manual_seed(1)).tolist()
TOKENS = 40


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> DiagnosedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    return DiagnosedModel(str(folder))


def sequence(model: DiagnosedModel) -> Sequence:
    return Sequence(model, PROMPT, len(PROMPT) + TOKENS + 8)


@pytest.mark.parametrize("selects", ["first", "each", "none"])
@pytest.mark.parametrize("drafts", [1, 3, 7])
def test_it_says_what_it_says_by_itself(model, selects, drafts):
    alone = decode(sequence(model), PROMPT[-1], TOKENS)
    done = speculate(sequence(model), PROMPT[-1], TOKENS, drafts, DraftAttention(48, selects))
    assert done.tokens == alone.tokens
    assert 0 < done.accepted < done.drafted, "some drafts are wrong, and some are right"
    assert done.rounds + done.accepted == TOKENS


def test_where_drafts_attend_to_everything_all_are_right(model):
    done = speculate(sequence(model), PROMPT[-1], TOKENS, 4, DraftAttention(1024, "first"))
    assert done.accepted == done.drafted
    assert done.rounds == TOKENS / 5


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_attend_to_all_that_stands_before_them(rows):
    torch.manual_seed(rows)
    query, key, value = torch.randn(6, rows, 16), torch.randn(2, 50, 16), torch.randn(2, 50, 16)
    out = attend_in_full(0, query, key, value, 0.3)
    for row in range(rows):
        end = 50 - rows + row + 1
        scores = query[:, row].view(2, 3, 16) @ key[:, :end].transpose(1, 2) * 0.3
        expected = (scores.softmax(-1) @ value[:, :end]).view(6, 16)
        torch.testing.assert_close(out[:, row], expected)


@pytest.mark.parametrize(("selects", "seen"), [("first", 1), ("each", 2), ("none", 0)])
def test_drafts_attend_to_what_was_selected_and_to_the_last_tokens(selects, seen):
    """Two tokens in the middle hold what a query asks for: the first draft's, and the second's."""
    attention = DraftAttention(48, selects)
    key = torch.zeros(1, 200, 16)
    key[0, 60, 0] = key[0, 90, 1] = 30.0
    value = torch.zeros(1, 200, 16)
    value[0, 60] = value[0, 90] = 1.0
    found = 0
    attention.begin_round()
    for number in range(2):
        query = torch.zeros(1, 1, 16)
        query[0, 0, number] = 10.0
        width = 199 + number
        out = attention(0, query, key[:, :width], value[:, :width], 1.0)
        found += bool(out.mean() > 0.5)
    assert found == seen
    assert attention._seen[0][0].numel() <= 48 + 1
    assert attention._seen[0][0][:N_INIT].tolist() == list(range(N_INIT))

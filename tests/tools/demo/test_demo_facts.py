"""SmolLM2 is sure of the demo's answers, so no rounding decides whether the demo succeeds."""

import copy

import pytest
import torch

from tests.oracle.model import OracleModel, Selection
from vllm_tokenselect.config import TokenSelectConfig
from vllm_tokenselect.tools.demo.command import SETTINGS
from vllm_tokenselect.tools.demo.document import FACTS, prompt

LEAD = 1.0  # nats
DEFAULTS = TokenSelectConfig()


@pytest.fixture(scope="module")
def prompts(tokenizer) -> list[list[int]]:
    return [tokenizer.encode(prompt(fact)) for fact in FACTS]


@pytest.fixture(scope="module")
def said(tokenizer) -> list[list[int]]:
    """Of each fact, the tokens that the answer begins with."""
    return [tokenizer.encode(f" {fact.answer}") for fact in FACTS]


@pytest.fixture(scope="module")
def going_on(tokenizer) -> torch.Tensor:
    """Bool [vocabulary]: tokens that would make another number or word of what was said before."""
    words = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    return torch.tensor([word[:1].isalnum() for word in words])


def shared_by(prompts: list[list[int]]) -> int:
    """How many tokens all of them begin with."""
    columns = zip(*prompts, strict=False)
    return next(index for index, column in enumerate(columns) if len(set(column)) > 1)


def leads(logits: torch.Tensor, answer: list[int], going_on: torch.Tensor) -> list[float]:
    """By how much each token of an answer, and then its end, is ahead of all else, nats.

    logits [len(answer) + 1, vocabulary]: before each of its tokens, and after the last.
    """
    tokens = torch.tensor(answer)[:, None]
    of_tokens = logits[:-1].gather(1, tokens)[:, 0]
    of_others = logits[:-1].scatter(1, tokens, -torch.inf).amax(dim=1)
    end = logits[-1, ~going_on].max() - logits[-1, going_on].max()
    return [*(of_tokens - of_others).tolist(), float(end)]


@torch.inference_mode()
def test_full_attention_decides_every_token_by_a_nat(smollm2, prompts, said, going_on):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    shared = shared_by(prompts)
    document = model(torch.tensor([prompts[0][:shared]]), logits_to_keep=1).past_key_values
    for fact, tokens, answer in zip(FACTS, prompts, said, strict=True):
        rest = torch.tensor([tokens[shared:] + answer])
        logits = model(
            rest, past_key_values=copy.deepcopy(document), logits_to_keep=len(answer) + 1
        )
        found = leads(logits.logits[0], answer, going_on)
        assert min(found) >= LEAD, (fact.question, found)


@pytest.mark.endurance  # minutes: the definition is not fast
def test_the_method_decides_every_token_by_a_nat(smollm2, prompts, said, going_on):
    settings = DEFAULTS.model_copy(update=SETTINGS).method
    names = Selection.__dataclass_fields__
    model = OracleModel(smollm2, Selection(**{name: getattr(settings, name) for name in names}))
    # Whole chunks of the document, none of which is the end of a prompt.
    chunk = model.settings.query_chunk
    shared = (min(map(len, prompts)) - model.settings.tail_queries) // chunk * chunk
    assert shared <= shared_by(prompts)
    model.begin(len(prompts[0]))
    model.next_logprobs(prompts[0][:shared], 0)
    document = list(model.cache)
    for fact, tokens, answer in zip(FACTS, prompts, said, strict=True):
        model.begin(len(tokens), document)
        logits = [model.next_logprobs(tokens[shared:], shared)]
        for position, token in enumerate(answer, start=len(tokens)):
            logits.append(model.next_logprobs([token], position))
        found = leads(torch.stack(logits), answer, going_on)
        assert min(found) >= LEAD, (fact.question, found)

"""Every prompt begins as no other does, so that no prefix cache helps."""

import pytest

from tests.tools.common.words import Words
from vllm_tokenselect.tools.bench.prompts import SHORTEST, Prompts


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("length", [SHORTEST, 1000])
def test_prompts_are_as_long_as_asked_and_differ_from_the_start(length, begins):
    prompts = Prompts(Words(begins=begins), seed=0)
    made = [prompts.new(length) for _ in range(20)]
    assert {len(prompt) for prompt in made} == {length}
    # A block of the prefix cache has 16 tokens at least.
    assert len({tuple(prompt[:16]) for prompt in made}) == 20
    assert all((prompt[0] == 0) == begins for prompt in made)


def test_a_seed_says_which_prompts_come():
    tokenizer = Words()
    first, again, other = (Prompts(tokenizer, seed) for seed in (1, 1, 2))
    assert first.new(100) == again.new(100) != other.new(100)


def test_a_text_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match="the text has only"):
        Prompts(Words(), 0, chapters=("a few words",)).new(100)

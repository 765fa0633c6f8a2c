"""Prompts have the length, hold the answer where they say and nowhere else, and are seeded."""

import random
import re
from itertools import pairwise

import pytest

from tests.tools.common.words import CHAT, Words
from vllm_tokenselect.tools.common.hidden import NUMBER, NUMBER_DIGITS, number_string_prompt
from vllm_tokenselect.tools.common.text import around, chapters_of, document, prefix
from vllm_tokenselect.tools.evaluate.questions import (
    EvalSettings,
    cells,
    question,
    refuse_what_does_not_fit,
)
from vllm_tokenselect.tools.evaluate.tasks import DEFAULT, LOSSES, TASKS, UnknownTask, known_tasks

RULER = [name for name, task in TASKS.items() if "RULER" in task.about]
ASKED_FOR_ONE = ["niah_single_1", "niah_multikey_2", "niah_multikey_3"]
LENGTH = 2048


@pytest.fixture(scope="module", params=["words", "smollm2"])
def tokens(request):
    return Words() if request.param == "words" else request.getfixturevalue("tokenizer")


@pytest.fixture(scope="module")
def words():
    """One for all: what lengths fit is kept by tokenizer."""
    return Words()


@pytest.mark.parametrize("depth", [0.0, 0.55, 1.0])
def test_a_number_string_stands_at_its_depth_of_a_prompt_of_the_length(tokens, depth):
    prompt = number_string_prompt(tokens, 1000, depth, seed=3)
    assert len(prompt.tokens) == 1000
    assert re.fullmatch(rf"\d{{{NUMBER_DIGITS}}}", prompt.expected)
    sentence = NUMBER.format(code=prompt.expected)
    assert tokens.decode(prompt.tokens[prompt.position :]).startswith(sentence)
    assert tokens.decode(prompt.tokens).count(prompt.expected) == 2
    assert prompt.depth == pytest.approx(depth, abs=0.15)


def test_half_of_a_number_strings_digits_double_their_neighbor(words):
    for seed in range(20):
        digits = number_string_prompt(words, 1000, 0.5, seed).expected
        assert sum(a == b for a, b in pairwise(digits)) >= NUMBER_DIGITS // 2


@pytest.mark.parametrize("name", RULER)
@pytest.mark.parametrize("length", [LENGTH, 4096])
def test_a_text_of_rulers_fills_the_length_but_not_more(words, name, length):
    # Frequent words come in steps, common words in tens.
    least = 0.8 if name in ("cwe", "fwe") else 0.93
    for number in range(3):
        size = len(TASKS[name].make(words, length, None, number).tokens)
        assert least * length <= size <= length, number


@pytest.mark.parametrize("name", ASKED_FOR_ONE)
def test_a_needle_is_in_the_prompt_once_where_it_is_said_to_be(tokens, name):
    for number in range(3):
        prompt = TASKS[name].make(tokens, LENGTH, None, number)
        text = tokens.decode(prompt.tokens)
        (expected,) = prompt.expected
        assert text.count(expected) == 1
        assert text.index(expected) / len(text) == pytest.approx(prompt.depth, abs=0.05)
        asked = re.search(r"for (\S+) mentioned in the provided text is$", text)[1]
        assert re.search(rf"for {asked} is: {expected}\.", text), "the needle that is asked for"


@pytest.mark.parametrize("name", ["niah_multivalue_noise", "niah_multiquery_noise"])
def test_four_needles_are_in_the_prompt_and_all_are_asked_for(tokens, name):
    prompt = TASKS[name].make(tokens, LENGTH, None, 0)
    text = tokens.decode(prompt.tokens)
    assert len(set(prompt.expected)) == 4
    asked = re.search(r"for ([^?]*) mentioned in the provided text are$", text)[1]
    for expected in prompt.expected:
        assert text.count(expected) == 1
        assert re.search(rf"for (\S+) is: {expected}\.", text)[1] in asked


def test_tracked_variables_are_those_that_a_chain_gives_the_value(words):
    prompt = TASKS["vt"].make(words, LENGTH, None, 1)
    text = words.decode(prompt.tokens)
    example, asked = text.split("Memorize and track")[1:]
    value = re.search(r"assigned the value (\d+) in the text", asked)[1]
    has_it = re.findall(rf"VAR (\w+) = {value}", asked)
    for _ in range(4):
        has_it += re.findall(rf"VAR (\w+) = VAR {has_it[-1]}\b", asked)
    assert has_it == list(prompt.expected)
    assert not any(variable in example for variable in prompt.expected)


def test_words_that_are_asked_for_are_the_most_frequent(words):
    for name, most in (("cwe", 10), ("fwe", 3)):
        prompt = TASKS[name].make(words, LENGTH, None, 2)
        text = words.decode(prompt.tokens)
        counts = {word: len(re.findall(rf"\b{word}\b", text)) for word in prompt.expected}
        others = re.findall(r"\d\. ([\w-]+)" if name == "cwe" else r"\b[a-z]{6}\b", text)
        least = min(counts.values())
        assert len(counts) == most
        assert not [w for w in set(others) - set(counts) if others.count(w) >= least]


@pytest.mark.parametrize("name", TASKS)
def test_prompts_are_seeded_and_leave_the_seeds_of_others_alone(words, name):
    depth = 0.5 if TASKS[name].chooses_depth else None
    random.seed(7)
    expected = random.random()
    random.seed(7)
    first = TASKS[name].make(words, LENGTH, depth, 4)
    assert random.random() == expected
    assert TASKS[name].make(words, LENGTH, depth, 4) == first
    other = TASKS[name].make(words, LENGTH, depth, 5)
    assert other.expected != first.expected
    assert first.expected
    assert len(first.tokens) <= LENGTH


def test_rulers_tasks_score_the_share_that_was_said_and_hidden_numbers_all_or_nothing():
    score = TASKS["niah_multivalue_noise"].score
    assert score("They are 123 and 456.", ["123", "456", "789", "012"]) == 0.5
    assert TASKS["cwe"].score("1. Apple 2. pear", ["apple", "pear"]) == 1.0
    assert TASKS["passkey"].score(" 12345.", ["12345"]) == 1.0
    assert TASKS["passkey"].score(" 123456", ["12345"]) == 0.0
    assert TASKS["number_string"].score("no 1122334455", ["1122334455"]) == 1.0


def test_text_stands_in_the_chat_template_or_behind_the_token_of_the_beginning():
    chat, plain = Words(chat=True, begins=True), Words(begins=True)
    before, after = around(chat, "Read: ", " What?", "It is ")
    assert chat.decode([*before, *after]) == CHAT.format("Read:  What?") + "It is "
    before, after = around(plain, "Read: ", " What?", "It is ")
    assert plain.decode([*before, *after]) == "<s>Read:  What?\n\nIt is "
    assert prefix(plain) == [0]
    assert prefix(Words()) == []


def test_a_cells_prompt_and_answer_fit_its_length_and_texts_are_all_of_it():
    tokenizer = Words(begins=True)
    settings = EvalSettings((*DEFAULT, *LOSSES), (LENGTH,), samples=2, texts=2)
    for cell in cells(settings):
        asked = question(cell, tokenizer, settings, chat=True)
        if asked.prompt is None:
            assert len(asked.read) == LENGTH
            assert asked.read[0] == 0
        else:
            assert len(asked.prompt.tokens) + TASKS[cell.task].max_tokens <= LENGTH
            assert not asked.text.startswith("<s>")
            assert asked.text.endswith(asked.prompt.begun)


def test_samples_are_spread_over_depths_the_deepest_first():
    found = list(cells(EvalSettings(("passkey", "vt"), (512,), samples=4, depths=2)))
    assert [cell.depth for cell in found] == [0.75, 0.75, 0.25, 0.25, None, None, None, None]
    assert {cell.number for cell in found[:4]} == {0, 1, 2, 3}
    other = cells(EvalSettings(("passkey",), (512,), samples=4, depths=2, seed=1))
    assert not {cell.number for cell in other} & {cell.number for cell in found}


def test_a_file_is_read_in_an_order_by_seed_and_says_nothing_twice(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(f"Paragraph {i % 50} of it." for i in range(100)))
    chapters = chapters_of(file, paragraphs=5)
    assert len(chapters) == 20
    words = Words()
    text = words.decode(document(words, 0, 350, chapters))
    assert document(words, 1, 350, chapters) != document(words, 0, 350, chapters)
    found = re.findall(r"Paragraph (\d+)", text)
    assert len(found) == len(set(found))
    with pytest.raises(ValueError, match="the text has only"):
        document(words, 0, 10**5, chapters)


def test_unknown_tasks_are_refused_by_name():
    with pytest.raises(UnknownTask, match="no task 'needle', 'nail': --tasks takes niah_single_1,"):
        known_tasks(["vt", "needle", "nail"])
    assert known_tasks(["vt", "vt", "perplexity"]) == ["vt", "perplexity"]


@pytest.mark.parametrize("name", DEFAULT)
def test_a_length_that_holds_no_prompt_is_refused_by_name(words, name):
    with pytest.raises(ValueError, match=f"{name} at --lengths 100: .*cannot hold"):
        refuse_what_does_not_fit(words, EvalSettings((name,), (100, 4096)))


def test_a_text_without_a_context_is_refused(words):
    with pytest.raises(ValueError, match="perplexity at --lengths 100: --steps 128 leaves nothing"):
        refuse_what_does_not_fit(words, EvalSettings(("perplexity",), (100,)))

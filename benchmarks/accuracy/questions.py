"""Where a question stands, and how long it is."""

from __future__ import annotations

from typing import Any

from vllm_tokenselect.tools.common.hidden import ASKED_AT_THE_END, Wording

_INTRODUCTION = "Read this text.\n\n"
_QUESTION = 'Finish the sentence with the number from the text: "{fact}'
_ANSWER = "The number is "
# What may stand between a question and the end of the prompt, about 24 tokens a sentence.
_MANNERS = (
    " Answer in one short sentence, without any comment of your own, and write all digits of the number.",
    " Do not translate the text, do not summarize it, and do not tell how you have found the sentence.",
    " If the text says the same thing several times, take the place where it is said for the first time.",
    " Leave the words of the sentence as they are, and do not put the number into quotation marks.",
    " The answer is read by a program that takes the first number in it and that knows no other form.",
    " Keep to the text alone, whatever you may know or believe about the matter from somewhere else.",
    " There is no need to be polite or to explain, and nothing else than the sentence is expected.",
    " Whoever wrote the text may have made mistakes; even so, the number is wanted as it stands there.",
    " Numbers are written in digits, without commas or spaces between them, and without any unit.",
    " Take your time, go through the text from its beginning to its end, and look at every paragraph.",
    " Nobody is served by a guess, but an answer that is left out would be of no use to anybody either.",
    " Write the sentence in the language of the text and end it with a full stop, as sentences do.",
)


def _long(sentences: int) -> Wording:
    manners = "".join(_MANNERS[:sentences])
    return Wording(_INTRODUCTION, f"\n\n{_QUESTION}{manners}", _ANSWER)


QUESTIONS = {
    # The prompt begins the answer with the words of the text, so what is asked for stands at its very end.
    "end": ASKED_AT_THE_END,
    # Here it does not: so many sentences of manners stand between.
    **{f"manners {n}": _long(n) for n in (0, 1, 2, 4, 8, 12)},
    "first": Wording(f"{_QUESTION}\n\n{_INTRODUCTION}", "", _ANSWER),
    "both": Wording(f"{_QUESTION}\n\n{_INTRODUCTION}", f"\n\n{_QUESTION}", _ANSWER),
}


def digits_only(tokenizer: Any) -> set[int]:
    """The tokens that are digits: a number does not end where one of them follows."""
    return {tokenizer.convert_tokens_to_ids(digit) for digit in "0123456789"}

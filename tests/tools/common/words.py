"""A tokenizer of words, digits and other characters, with what the tasks use of transformers' ones."""

from __future__ import annotations

import re
from collections.abc import Sequence

BEGIN = "<s>"
CHAT = "<user>{}</user><answer>"


class Words:
    """Learns its vocabulary as it goes; digits are tokens of their own.

    Args:
        chat: whether the model has a chat template.
        begins: whether a token of the beginning stands before every text.
    """

    eos_token_id = 1

    def __init__(self, chat: bool = False, begins: bool = False) -> None:
        self.chat_template = CHAT if chat else None
        self._begins = begins
        self._words = [BEGIN, "</s>"]
        self._ids = {word: i for i, word in enumerate(self._words)}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        tokens = [0] if self._begins and add_special_tokens else []
        for word in re.findall(r"[A-Za-z]+|.", text, re.DOTALL):
            if word not in self._ids:
                self._ids[word] = len(self._words)
                self._words.append(word)
            tokens.append(self._ids[word])
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(self._words[token] for token in tokens)

    def apply_chat_template(self, messages, tokenize=False, add_generation_prompt=True) -> str:
        return CHAT.format(messages[0]["content"])

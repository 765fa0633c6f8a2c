"""Where the steps of a prompt may end, so that no chunk is split and no CUDA graph sees its end."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_tokenselect.method.settings import Method, SettingsError


@dataclass(frozen=True)
class PromptSteps:
    """How many of a prompt's tokens a step may compute.

    1. A step ends at a multiple of `query_chunk`, at the start of the tail, or past it.
    2. Where layers share selections, a CUDA graph of decoding steps takes every row for a generated token.
       So a step of a prompt that selects has more tokens than a request has in such a step, and what it
       leaves of the prompt has too.

    Attributes:
        method: with query chunks that line up with the KV blocks.
        replayed: most tokens of a request in a step that a CUDA graph may replay; 0 where prompts may be
            among them.
    """

    method: Method
    replayed: int = 0

    def check(self) -> None:
        """Check that no prompt can be left with too few tokens, or needs more than a query chunk's.

        Raises:
            SettingsError: naming the setting, its value and what is allowed.
        """
        if not self.replayed:
            return
        least = {
            "tail_queries": self.replayed + 1,
            "n_local": self.replayed,
            "query_chunk": 2 * self.replayed + 1,
        }
        for name, number in least.items():
            if (value := getattr(self.method, name)) < number:
                raise SettingsError(
                    f"tokenselect {name}={value} cannot be used with anchor_layers="
                    f"{self.method.anchor_layers!r} and CUDA graphs of up to {self.replayed} tokens a "
                    "request: the end of a prompt selects in every layer, and has to stay out of these "
                    f"graphs. Set {name} to at least {number}, or leave graphs out with --enforce-eager."
                )

    def fit(self, num_prompt_tokens: int, start: int, num_tokens: int) -> int:
        """As many of a request's next tokens from `start` on, up to so many, as a step may compute."""
        fitting = self.method.whole_chunks(num_prompt_tokens, start, num_tokens)
        if not self._stays_out(num_prompt_tokens, start):
            return fitting
        if start + fitting < num_prompt_tokens:
            fitting = min(fitting, num_prompt_tokens - start - self.replayed - 1)
        return fitting if fitting > self.replayed else 0

    def shortest(self, num_prompt_tokens: int, start: int) -> int:
        """The fewest of a prompt's tokens from `start` on that a step may compute."""
        fewest = self.method.next_chunk(num_prompt_tokens, start)
        if not self._stays_out(num_prompt_tokens, start):
            return fewest
        fewest = max(fewest, self.replayed + 1)
        left = num_prompt_tokens - start
        return fewest if left - fewest > self.replayed else left

    def _stays_out(self, num_prompt_tokens: int, start: int) -> bool:
        """Whether a request may have a row of its prompt that selects, with the least `top_k` even."""
        may_select = num_prompt_tokens > self.method.n_init + self.method.n_local + 1
        return self.replayed > 0 and may_select and start < num_prompt_tokens

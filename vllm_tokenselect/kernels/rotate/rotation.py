"""The table that a layer rotates its queries and keys with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_tokenselect.device_memory import make_lasting


@dataclass(frozen=True)
class Rotation:
    """Positions for the attended tokens `0 .. m - 1` in their order, whatever theirs in the text are.

    Elements `i` and `i + rotated / 2` of a head are a pair (NeoX); elements from `rotated` on stay
    as they are. Keys are cached without any rotation.

    Attributes:
        cos_sin: fp32 [positions, rotated], contiguous; cosines in the first half of a line, sines in
            the second, both times the magnitude that the kind of RoPE may have (YaRN).
        vote: fp32 [rotated], contiguous; a query turned by it scores un-rotated keys as if they
            stood at position 0 and the query at `n_local`.
    """

    cos_sin: torch.Tensor
    vote: torch.Tensor

    @classmethod
    def from_table(cls, table: torch.Tensor, num_positions: int, n_local: int) -> Rotation:
        """Take the first positions of a rotary embedding's table.

        Args:
            table: [positions, rotated] of any dtype, lines as in `cos_sin`.
            num_positions: most tokens that a query attends to.
            n_local: the setting.

        Raises:
            ValueError: when the table has fewer positions.
        """
        if len(table) < num_positions:
            raise ValueError(
                f"the rotary table has {len(table)} positions of {num_positions} needed"
            )
        # A copy, which lasts when the model's own table is gone.
        cos_sin, vote = make_lasting(lambda: cls._from_lines(table[:num_positions], n_local))
        return cls(cos_sin, vote)

    @staticmethod
    def _from_lines(lines: torch.Tensor, n_local: int) -> tuple[torch.Tensor, torch.Tensor]:
        cos_sin = lines.to(torch.float32, copy=True).contiguous()
        cosine, sine = cos_sin[n_local].chunk(2)
        first_cosine, first_sine = cos_sin[0].chunk(2)
        # The key at position 0 may be scaled; the inverse turn of the query has the same effect.
        vote = torch.cat(
            [
                cosine * first_cosine + sine * first_sine,
                sine * first_cosine - cosine * first_sine,
            ]
        )
        return cos_sin, vote

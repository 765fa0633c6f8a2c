"""Where the candidates of rows lie in buffers that the rows share.

A row takes as many columns as it has candidates, whatever the other rows have: what a step needs follows
from the sum of its contexts, not from its longest one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Columns:
    """Columns of rows, one row behind the other.

    Attributes:
        starts: int32 [R + 1], multiples of 4 that never fall. Row `r` has the columns
            [starts[r], starts[r + 1]), no fewer than it has candidates.
        widest: no row has more columns.
    """

    starts: torch.Tensor
    widest: int

    @property
    def num_rows(self) -> int:
        return len(self.starts) - 1

    @staticmethod
    def equal(num_rows: int, width: int, device: torch.device | str = "cpu") -> Columns:
        """Rows of `width` columns each."""
        starts = torch.arange(num_rows + 1, dtype=torch.int32, device=device) * width
        return Columns(starts, width)

    def part(self, first: int, last: int) -> Columns:
        """The rows [first, last)."""
        return Columns(self.starts[first : last + 1], self.widest)

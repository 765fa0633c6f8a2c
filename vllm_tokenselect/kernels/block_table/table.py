"""What building the sparse block table gives to whatever attends."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SparseBlockTable:
    """Which cached tokens every row attends to: a block table of page size 1.

    Attributes:
        slots: int32 [R, width], KV slots of a row's tokens in order of position; of a row only its
            first entries are defined, as many as its length.
        lengths: int32 [R], entries of each row; 0 for a padded row.
    """

    slots: torch.Tensor
    lengths: torch.Tensor

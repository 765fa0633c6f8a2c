"""What one layer remembers of each request's last selection, on any device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_tokenselect.device_memory import make_lasting

SELECTS = -1  # of a row that reuses no selection, in place of where that one's candidates ended


@dataclass(frozen=True)
class SelectionCacheState:
    """One line for each seat.

    A line belongs to a row of the plan if its owner is the row's: owners are never used again, so
    nothing has to be reset when a seat is given away.

    Attributes:
        query: [capacity, Hq, D], that of the last selection.
        selected: int32 [capacity, selection_size], the KV slots of the sink and of what was selected,
            in order of position. They stay right because the blocks of a running request never move.
        candidate_end: int32 [capacity], where the candidates ended then: everything from there on is
            attended too when the selection is reused.
        owner: int32 [capacity], whose line it is; 0 for nobody's.
    """

    query: torch.Tensor
    selected: torch.Tensor
    candidate_end: torch.Tensor
    owner: torch.Tensor

    @classmethod
    def allocate(
        cls,
        capacity: int,
        selection_size: int,
        num_heads: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> SelectionCacheState:
        """State of `capacity` seats, all of them nobody's.

        Args:
            selection_size: most tokens of a sink and what is selected, `n_init + top_k`.
            dtype: of the stored queries; what the layer's queries have.
        """

        def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.empty((capacity, *shape), dtype=dtype, device=device)

        return cls(
            query=empty(num_heads, head_size, dtype=dtype),
            selected=empty(selection_size),
            candidate_end=empty(),
            # All that is read of a line that is nobody's.
            owner=make_lasting(lambda: empty().zero_()),
        )

    @property
    def num_bytes(self) -> int:
        """Memory of the layer's state."""
        return sum(t.nbytes for t in (self.query, self.selected, self.candidate_end, self.owner))

"""What the buffers of a GPU are allocated for, and how many rows of a step fit into them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from vllm_tokenselect.method.plan import Int64
from vllm_tokenselect.method.settings import Method, SettingsError

Number = TypeVar("Number", int, Int64)

# Kernels number the scores with 32 bits.
MOST_WORKSPACE_BYTES = (4 << 31) - 1
# Most rows of a group: lines of the sparse block table.
MAX_GROUP_ROWS = 512
# Size of the sparse block table, which has one line at least.
TABLE_BYTES = 128 << 20
# Most groups of a step in a CUDA graph: with more, launching its kernels takes longer than their work.
GRAPH_GROUPS = 16
# Columns of a row are multiples of it, so that one compiled kernel fits all of them.
WIDTH_STEP = 64
# So are lines of the sparse block table.
LINE_STEP = 16


@dataclass(frozen=True)
class StepLimits:
    """What the buffers of a step are cut for.

    Buffers that were cut for a longest context hold every step that is cut for a shorter one.

    Attributes:
        method: the settings.
        num_heads, num_kv_heads: of a layer.
        max_model_len: longest context.
        workspace_bytes: for the votes of a group, and the scores of one whose scores are stored.
        full_attention: whether requests may ask for full attention; their rows are as long as their
            context.
        max_tokens: most tokens of a step. Needed where positions are reassigned: a buffer holds the
            rotated queries of all of them; and where layers share selections, which are kept for a step.
        graph_rows: most rows of a step that a CUDA graph may replay. Needed where layers share selections.
        graph_queries: most tokens of a request in such a step. Scores of rows of so many queries are
            stored, in any step; those of rows of more queries are computed twice.

    Raises:
        SettingsError: when the workspace cannot hold one query's scores over the longest context, or is of
            8 GiB or more.
    """

    method: Method
    num_heads: int
    num_kv_heads: int
    max_model_len: int
    workspace_bytes: int
    full_attention: bool = False
    max_tokens: int = 0
    graph_rows: int = 0
    graph_queries: int = 1

    def __post_init__(self) -> None:
        if self.workspace_bytes > MOST_WORKSPACE_BYTES:
            raise SettingsError(
                f"tokenselect workspace_mb={self.workspace_bytes >> 20} is more than a GPU's kernels can "
                f"number. Set workspace_mb to at most {MOST_WORKSPACE_BYTES >> 20}."
            )
        if self.workspace_bytes < self.row_bytes(self.max_width):
            needed = -(-self.row_bytes(self.max_width) // 2**20)
            raise SettingsError(
                f"tokenselect workspace_mb={self.workspace_bytes >> 20} cannot hold the scores of "
                f"one query over max_model_len={self.max_model_len} tokens and {self.num_heads} "
                f"heads. Set workspace_mb to at least {needed}, or lower --max-model-len."
            )

    @property
    def max_width(self) -> int:
        """Columns of the longest context's last token, which has most candidates."""
        return self.width_of(self.max_model_len - 1 - self.method.n_local)

    def width_of(self, candidate_end: int) -> int:
        """Columns of a row whose candidates end there."""
        return _rounded_up(max(candidate_end - self.method.n_init, 0), WIDTH_STEP)

    def widths_of(self, candidate_ends: Int64) -> Int64:
        """The same of rows, int64 [R]."""
        return _rounded_up(np.maximum(candidate_ends - self.method.n_init, 0), WIDTH_STEP)

    @property
    def table_width(self) -> int:
        """Most tokens that one row attends to: the width of the sparse block table."""
        return max(self.generated_width, self.max_model_len if self.full_attention else 0)

    @property
    def generated_width(self) -> int:
        """Most tokens that a generated token of a request with selection attends to."""
        return max(self.method.max_attended, min(self.method.min_context, self.max_model_len))

    @property
    def line_width(self) -> int:
        """Entries of a line of the sparse block table."""
        return _rounded_up(self.table_width, LINE_STEP)

    @property
    def table_rows(self) -> int:
        """Lines of the sparse block table."""
        return min(max(TABLE_BYTES // (4 * self.line_width), 1), MAX_GROUP_ROWS)

    @property
    def table_entries(self) -> int:
        """Entries of the sparse block table's buffer; shorter contexts have more lines."""
        line = self.line_width
        return max(min(TABLE_BYTES // 4, MAX_GROUP_ROWS * line), line)

    @property
    def kept_width(self) -> int:
        """Entries of a line that is kept for a step that no CUDA graph replays.

        Longer rows, of requests without selection, are not kept: all layers write the same into them.
        """
        return _rounded_up(self.generated_width, LINE_STEP)

    @property
    def kept_rows(self) -> int:
        """Rows whose lines are kept for a step: all that may follow. A row has a token at least."""
        rows = max(self.max_tokens, self.graph_rows)
        return rows if self.method.shares_selections else 0

    @property
    def kept_entries(self) -> int:
        """Entries of the lines that are kept for a step.

        Every row of a captured step has one, and any of them may see its whole context.
        """
        entries = max(self.max_tokens * self.kept_width, self.graph_rows * self.line_width)
        return entries if self.method.shares_selections else 0

    @property
    def score_columns(self) -> int:
        """Columns of every head's scores and of the votes, which the rows of a group share."""
        columns = _whole_columns(self.workspace_bytes // 4 // (self.num_heads + 1))
        return min(columns, MAX_GROUP_ROWS * self.max_width)

    @property
    def vote_columns(self) -> int:
        """Columns of the votes of a group whose scores are computed twice, which has nothing else."""
        columns = _whole_columns(self.workspace_bytes // 4)
        return min(columns, MAX_GROUP_ROWS * self.max_width)

    @property
    def score_bytes(self) -> int:
        """What the scores and the votes of any step take of the workspace, at most."""
        return min(self.workspace_bytes, MAX_GROUP_ROWS * self.row_bytes(self.max_width))

    def row_bytes(self, width: int) -> int:
        """Every head's scores of a row of `width` candidates, and its votes."""
        return 4 * width * (self.num_heads + 1)


def _whole_columns(columns: int) -> int:
    return columns // WIDTH_STEP * WIDTH_STEP


def _rounded_up(number: Number, step: int) -> Number:
    return -(-number // step) * step

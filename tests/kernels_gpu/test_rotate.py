"""Queries are rotated to the last positions of their rows."""

import pytest
import torch

from tests.kernels_gpu.cases import DEVICE, int32
from vllm_tokenselect.kernels.rotate import gpu, reference
from vllm_tokenselect.kernels.rotate.rotation import Rotation

POSITIONS = 300
# Heads, head size, rotated elements: all of a head, and parts of it.
SHAPES = [
    (7, 64, 64),
    (9, 64, 16),
    (4, 80, 80),
    (3, 80, 32),
    (1, 96, 24),
    (2, 96, 96),
    (5, 128, 128),
    (2, 128, 64),
    (2, 256, 256),
    (3, 112, 28),
    (1, 512, 512),
    (1, 512, 128),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rotation(rotated: int) -> Rotation:
    """Large angles and small ones, and a magnitude."""
    angle = torch.outer(torch.arange(float(POSITIONS)), 0.3 ** torch.arange(rotated // 2))
    table = 1.3 * torch.cat([angle.cos(), angle.sin()], dim=1)
    return Rotation.from_table(table.to(DEVICE), POSITIONS, 16)


def assert_rotated_as_defined(query, start, count, lengths, cos_sin, longest):
    actual, expected = (torch.full(query.shape, 9.0).to(query) for _ in range(2))
    gpu.rotate_queries(query, start, count, longest, lengths, cos_sin, actual)
    reference.rotate_queries(query, start, count, lengths, cos_sin, expected)
    torch.testing.assert_close(actual, expected)
    return actual


@pytest.mark.parametrize(
    ("heads", "size", "width", "dtype"),
    [(*shape, DTYPES[i % 3]) for i, shape in enumerate(SHAPES)],
    ids=str,
)
def test_the_queries_of_a_row_get_its_last_positions(heads, size, width, dtype):
    query = torch.randn(70, heads, size, device=DEVICE).to(dtype)
    # All of a context, the end of one, a single token; a padded row; up to the table's last line.
    start, count = int32(0, 35, 36, 37, 37), int32(35, 1, 1, 0, 20)
    lengths = int32(35, 150, 1, 0, POSITIONS)
    out = assert_rotated_as_defined(query, start, count, lengths, rotation(width).cos_sin, 35)
    assert (out[57:] == 9).all(), "written where no row's queries are"


@pytest.mark.parametrize("programs", [1, 3, 100])
def test_the_number_of_programs_that_share_a_row_does_not_matter(programs, monkeypatch):
    monkeypatch.setattr(gpu, "num_programs_wanted", lambda: programs)
    query = torch.randn(90, 1, 64, device=DEVICE)
    assert_rotated_as_defined(query, int32(3), int32(83), int32(200), rotation(64).cos_sin, 83)


def test_rows_of_requests_that_only_fill_up_a_batch_are_left_out():
    query = torch.randn(4, 2, 64, device=DEVICE)
    rows = (int32(0, 1, 4), int32(1, 3, 0), int32(0, 0, 0))
    out = assert_rotated_as_defined(query, *rows, rotation(64).cos_sin, 3)
    assert (out == 9).all()


def test_queries_may_be_a_slice_of_the_projection():
    projected = torch.randn(40, 5 * 64, device=DEVICE)
    query = projected[:, : 3 * 64].view(40, 3, 64)
    out = torch.empty(40, 3, 64, device=DEVICE)
    cos_sin = rotation(32).cos_sin
    gpu.rotate_queries(query, int32(0), int32(40), 40, int32(77), cos_sin, out)
    torch.testing.assert_close(out, reference.rotate(query, cos_sin[37:77]))

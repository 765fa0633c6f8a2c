"""A row asks with the mean of its queries, which is rotated where positions are reassigned."""

import pytest
import torch

from tests.kernels_gpu.cases import DEVICE, int32
from tests.kernels_gpu.test_rotate import SHAPES, rotation
from vllm_tokenselect.kernels.mean_query import gpu, reference
from vllm_tokenselect.kernels.rotate.reference import rotate

# The last is padding.
START, LENGTH = (0, 70, 71, 72, 140, 0), (70, 1, 1, 68, 31, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_size", [64, 80, 512])
def test_means_are_those_of_the_definition(dtype: torch.dtype, head_size: int):
    query = torch.randn(200, 3, head_size, device=DEVICE).to(dtype)
    start, length = int32(*START), int32(*LENGTH)
    means = torch.full((6, 3, head_size), 9.0, device=DEVICE)
    gpu.mean_queries(query, start, length, means)
    torch.testing.assert_close(means, reference.mean_queries(query, start, length))


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize(("heads", "size", "rotated"), SHAPES)
def test_means_are_rotated_by_the_line_of_the_vote(heads, size, rotated, rows):
    vote = rotation(rotated).vote
    query = torch.randn(200, heads, size, device=DEVICE)
    start, length = int32(*START[:rows]), int32(*LENGTH[:rows])
    means = torch.full((rows + 1, heads, size), 9.0, device=DEVICE)
    gpu.mean_queries(query, start, length, means[:rows], vote)
    expected = rotate(reference.mean_queries(query, start, length), vote[None])
    torch.testing.assert_close(means[:rows], expected)
    assert (means[rows] == 9).all(), "written past the rows"


def test_queries_may_be_a_slice_of_the_projection():
    projected = torch.randn(40, 5 * 64, device=DEVICE)
    query = projected[:, : 3 * 64].view(40, 3, 64)
    means = torch.empty(1, 3, 64, device=DEVICE)
    gpu.mean_queries(query, int32(3), int32(33), means)
    torch.testing.assert_close(means[0], query[3:36].mean(dim=0))

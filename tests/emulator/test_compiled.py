"""Mistakes in real kernels, made in their compiled text, do not stay hidden."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

from tests.emulator.driver import EmulatedGpu
from tests.emulator.memory import Fault
from tests.kernels_gpu.cases import int32
from tests.kernels_gpu.test_block_table import assert_same_table, identity_table
from vllm_tokenselect.kernels.mean_query import gpu as mean_gpu
from vllm_tokenselect.kernels.mean_query import reference as mean_reference

pytestmark = pytest.mark.emulated


def check_means() -> None:
    query = torch.randn(50, 2, 64)
    start, length = int32(0, 37), int32(37, 13)
    means = torch.zeros(2, 2, 64)
    mean_gpu.mean_queries(query, start, length, means)
    torch.testing.assert_close(means, mean_reference.mean_queries(query, start, length))


def check_table() -> None:
    votes = torch.rand(1, 3000).round(decimals=2)
    assert_same_table(votes, identity_table(1, 32), int32(0), 16, 500, int32(3016), int32(3100), 32)


kernels = pytest.mark.parametrize("check", [check_means, check_table])
Edit = Callable[[str, str], str]  # a kernel's name and its PTX


def texts_of(gpu: EmulatedGpu, check: Callable[[], None]) -> dict[str, str]:
    """The PTX of all kernels that a check launches; the check passes."""
    texts = {}

    def remember(name: str, text: str) -> str:
        texts[name] = text
        return text

    with gpu.editing(remember):
        check()
    return texts


def assert_found_out(gpu: EmulatedGpu, check: Callable[[], None], edit: Edit) -> None:
    """With the kernels' texts edited, a check faults or finds another result."""
    with gpu.editing(edit), pytest.raises((Fault, AssertionError)):
        check()


@kernels
@pytest.mark.parametrize("seed", range(3))
def test_a_kernel_is_right_in_any_order(emulated_gpu: EmulatedGpu, check, seed: int):
    with emulated_gpu.editing(lambda _, text: text, seed):
        check()


def test_each_barrier_of_the_means_is_missed(emulated_gpu: EmulatedGpu):
    [text] = texts_of(emulated_gpu, check_means).values()
    places = [match.span() for match in re.finditer(r"\bbar\.sync\s+0;", text)]
    assert places
    for first, last in places:
        without = text[:first] + text[last:]
        assert_found_out(emulated_gpu, check_means, lambda _, __, text=without: text)


def test_the_barriers_of_every_kernel_of_the_table_are_missed(emulated_gpu: EmulatedGpu):
    texts = texts_of(emulated_gpu, check_table)
    for kernel in [name for name, text in texts.items() if "bar.sync" in text]:

        def edit(name: str, text: str, kernel: str = kernel) -> str:
            return re.sub(r"\bbar\.sync\s+0;", "", text) if name == kernel else text

        assert_found_out(emulated_gpu, check_table, edit)


@kernels
def test_a_bound_that_is_one_too_far_is_found_out(emulated_gpu: EmulatedGpu, check):
    edit = lambda _, text: text.replace("setp.lt.s32", "setp.le.s32")  # noqa: E731
    assert_found_out(emulated_gpu, check, edit)


@kernels
def test_a_store_one_further_is_found_out(emulated_gpu: EmulatedGpu, check):
    place = re.compile(r"(st\.global[\w.]*\s+\[ ?%rd\d+) \+ 0 ?\]")
    assert all(place.search(text) for text in texts_of(emulated_gpu, check).values())
    assert_found_out(emulated_gpu, check, lambda _, text: place.sub(r"\1+16]", text))


@kernels
def test_an_argument_that_is_not_aligned_is_a_fault(emulated_gpu: EmulatedGpu, check):
    place = re.compile(r"(ld\.param\.b64\s+(%rd\d+), \[\w+_param_0\];)")
    assert all(place.search(text) for text in texts_of(emulated_gpu, check).values())
    move = lambda _, text: place.sub(r"\1 add.s64 \2, \2, 2;", text)  # noqa: E731
    with emulated_gpu.editing(move), pytest.raises(Fault, match="not aligned"):
        check()

"""Blocks that are kept come back as they were, in whichever part of a chunk they are."""

import pytest

pytest.importorskip("vllm")

import torch
from vllm.v1.kv_offload.base import (
    CanonicalKVCacheRef,
    CanonicalKVCaches,
    CanonicalKVCacheTensor,
    GPULoadStoreSpec,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec

from vllm_tokenselect.backend.cpu_offloading import CpuOffloadingWorker

BLOCKS, PAGE, CHUNKS = 12, 8, 6


class Region:
    """Stands in for vLLM's shared memory."""

    def create_next_worker_view(self, size: int) -> torch.Tensor:
        wide = torch.zeros(CHUNKS, 3 * size, dtype=torch.int8)
        return wide[:, size : 2 * size]

    def cleanup(self) -> None:
        pass


def page(layer: int, block: int) -> int:
    return 1 + layer * BLOCKS + block


@pytest.fixture
def worker(request):
    """Two groups of layers: the first has two tensors, the second one."""
    tensors = [
        torch.stack([torch.full((PAGE,), page(layer, b), dtype=torch.int8) for b in range(BLOCKS)])
        for layer in range(3)
    ]
    groups = [
        [CanonicalKVCacheRef(0, PAGE), CanonicalKVCacheRef(1, PAGE)],
        [CanonicalKVCacheRef(2, PAGE)],
    ]
    caches = CanonicalKVCaches([CanonicalKVCacheTensor(t, PAGE) for t in tensors], groups)
    return CpuOffloadingWorker(caches, request.param, Region())


@pytest.mark.parametrize("worker", [1, 2, 3], indirect=True, ids="{} blocks a chunk".format)
@pytest.mark.parametrize("first", [0, 1, 2, 3])
def test_blocks_come_back_as_they_were(worker, first):
    part = worker.blocks_per_chunk
    kept = GPULoadStoreSpec([5, 9, 2, 7], group_sizes=[3, 1], block_indices=[first, 0])
    needed = (first + 2) // part - first // part + 1
    chunks = CPULoadStoreSpec([*range(needed), 5])
    assert worker.submit_store(1, kept, chunks)
    (stored,) = worker.get_finished()
    assert (stored.job_id, stored.success, stored.transfer_size) == (1, True, 7 * PAGE)
    back = GPULoadStoreSpec([0, 1, 3, 4], group_sizes=[3, 1], block_indices=[first, 0])
    assert worker.submit_load(2, chunks, back)
    for source, target in ((5, 0), (9, 1), (2, 3)):
        for layer in (0, 1):
            assert (worker.cached[layer][target] == page(layer, source)).all()
    assert (worker.cached[2][4] == page(2, 7)).all()
    assert (worker.cached[2][0] == page(2, 0)).all(), "another group's blocks are left alone"
    assert [result.job_id for result in worker.get_finished()] == [2]
    worker.shutdown()

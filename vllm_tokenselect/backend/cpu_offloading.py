"""vLLM's KV offloading for servers on a CPU, whose blocks it copies from and to GPUs only.

The KV cache of such a server lies in host memory already. What offloading adds are blocks that outlive
their place in the cache, and with `secondary_tiers` in files also the server. vLLM's options choose it:

    --kv-transfer-config '{"kv_connector": "OffloadingConnector", "kv_role": "kv_both",
        "kv_connector_extra_config": {"spec_name": "CpuOffloadingSpec",
            "spec_module_path": "vllm_tokenselect.backend.cpu_offloading", "cpu_bytes_to_use": 1000000000,
            "secondary_tiers": [{"type": "fs", "root_dir": "FOLDER"}]}}'

All but the copies is vLLM's: what is kept, what is looked up, and the files.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from vllm.v1.kv_offload.base import (
    BlockIDsLoadStoreSpec,
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.config import OffloadingConfig
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from vllm_tokenselect.method.settings import SettingsError


class CpuOffloadingSpec(TieringOffloadingSpec):
    """Blocks in host memory, and in whatever tiers vLLM has behind it."""

    def __init__(self, config: OffloadingConfig) -> None:
        super().__init__(config)
        self.copies: CpuOffloadingWorker | None = None

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        """The one that copies blocks in this worker's process.

        Raises:
            SettingsError: for a layout that these copies do not have.
        """
        if self.copies is None:
            if self.config.canonical_layout:
                raise SettingsError(
                    "canonical_layout cannot be used with CpuOffloadingSpec. Leave it out."
                )
            region = SharedOffloadRegion(
                engine_id=self._engine_id,
                num_chunks=self.num_chunks,
                rank=0 if self.replicated_layout else self.config.parallel.rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            self.copies = CpuOffloadingWorker(kv_caches, self.blocks_per_chunk, region)
        return self.copies


class CpuOffloadingWorker(OffloadingWorker):
    """Copies blocks when it is told to.

    Args:
        kv_caches: the worker's KV cache; each of its tensors is int8 [num_blocks, page_size].
        blocks_per_chunk: blocks that are kept as one.
        region: where they are kept.
    """

    def __init__(
        self, kv_caches: CanonicalKVCaches, blocks_per_chunk: int, region: SharedOffloadRegion
    ) -> None:
        self.region = region
        self.blocks_per_chunk = blocks_per_chunk
        self.cached = [each.tensor for each in kv_caches.tensors]
        # Each int8 [num_chunks, blocks_per_chunk, page_size].
        self.kept = [
            region.create_next_worker_view(each.page_size_bytes * blocks_per_chunk).unflatten(
                1, (blocks_per_chunk, each.page_size_bytes)
            )
            for each in kv_caches.tensors
        ]
        self.tensors_of_group = [
            sorted({ref.tensor_idx for ref in refs}) for refs in kv_caches.group_data_refs
        ]
        self.finished: list[TransferResult] = []

    def submit_store(
        self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec
    ) -> bool:
        start = time.perf_counter()
        size = 0
        for index, block, chunk, part in self._blocks(src_spec, dst_spec):
            self.kept[index][chunk, part].copy_(self.cached[index][block])
            size += self.cached[index].shape[1]
        return self._finish(job_id, size, start)

    def submit_load(
        self,
        job_id: int,
        src_spec: LoadStoreSpec,
        dst_spec: GPULoadStoreSpec,
        expedited: bool = False,
    ) -> bool:
        start = time.perf_counter()
        size = 0
        for index, block, chunk, part in self._blocks(dst_spec, src_spec):
            self.cached[index][block].copy_(self.kept[index][chunk, part])
            size += self.cached[index].shape[1]
        return self._finish(job_id, size, start)

    def get_finished(self) -> list[TransferResult]:
        finished, self.finished = self.finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        """Nothing is under way."""

    def shutdown(self) -> None:
        self.kept.clear()
        self.cached.clear()
        self.region.cleanup()

    def _finish(self, job_id: int, size: int, start: float) -> bool:
        seconds = time.perf_counter() - start
        self.finished.append(TransferResult(job_id, True, size, seconds))
        return True

    def _blocks(
        self, cached: GPULoadStoreSpec, kept: LoadStoreSpec
    ) -> Iterator[tuple[int, int, int, int]]:
        """What belongs together: tensor, block of the cache, chunk that is kept, and which part of it."""
        assert isinstance(kept, BlockIDsLoadStoreSpec)
        blocks, chunks = iter(cached.block_ids.tolist()), iter(kept.block_ids.tolist())
        for tensors, size, first in zip(
            self.tensors_of_group, cached.group_sizes, cached.block_indices, strict=True
        ):
            chunk = -1
            for position in range(first, first + size):
                part = position % self.blocks_per_chunk
                if part == 0 or position == first:
                    chunk = next(chunks)
                block = next(blocks)
                for index in tensors:
                    yield index, block, chunk, part

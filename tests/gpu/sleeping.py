"""A stand-in for the memory pool in which vLLM loads a model, and for what a deep sleep does to it.

As on a GPU, what the loading thread allocates lies in the pool, and nothing else. `sleep` at level 2
discards its contents; vLLM then restores the model's buffers and whoever woke it the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GARBAGE = 0xFF  # NaN in every floating dtype, -1 in every integer one


def storages_of(values: Any) -> list[torch.UntypedStorage]:
    """Storages of all tensors in there that have one."""
    tensors = (value for value in tree_leaves(values) if isinstance(value, torch.Tensor))
    return [tensor.untyped_storage() for tensor in tensors if not tensor.is_meta]


class WeightsPool(TorchDispatchMode):
    """Records every storage that is made within it, by this thread."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {storage.data_ptr() for storage in storages_of((args, kwargs))}
        for storage in storages_of(result):
            if storage.data_ptr() not in given:  # a view allocates nothing
                self.storages[storage.data_ptr()] = StorageWeakRef(storage)
        return result

    @contextmanager
    def loading(self, tag: str) -> Iterator[None]:
        """vLLM's context for the allocations of a kind."""
        with self if tag == "weights" else nullcontext():
            yield

    def sleep_and_wake(self, kept: Iterable[torch.Tensor]) -> int:
        """Fill with garbage what lives in the pool, but for what is restored or loaded again.

        Returns:
            How many bytes were lost.
        """
        restored = {tensor.untyped_storage().data_ptr() for tensor in kept}
        lost = 0
        for address, reference in self.storages.items():
            if reference.expired() or address in restored:
                continue
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage.data_ptr() == address:
                storage.fill_(GARBAGE)
                lost += storage.nbytes()
        return lost

"""Device memory that outlasts a server's sleep.

Models are loaded in a memory pool of vLLM's, whose contents are gone after a deep sleep (`level=2`), and
what layers allocate meanwhile lies in it too. That will do for scratch, which every step writes before it
reads. What must stay as it was made is made here.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def make_lasting(make: Callable[[], T]) -> T:
    """What `make` returns: tensors that no memory pool of the caller's holds.

    Args:
        make: names the device of every tensor that it makes.
    """
    # In a thread of its own, where neither the caller's memory pool holds nor its inference mode, outside
    # of which the tensors could not be written to.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()

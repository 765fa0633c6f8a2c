"""A process counts in one tensor a device, which can be added to wherever layers run."""

import torch

from vllm_tokenselect import counters
from vllm_tokenselect.counters import Counter, worker_counters


def test_a_process_has_one_tensor_a_device():
    cpu = worker_counters(torch.device("cpu"))
    assert cpu.shape == (len(Counter),)
    assert cpu.dtype == torch.int64
    assert worker_counters(torch.device("cpu")) is cpu
    assert worker_counters(torch.device("meta")) is not cpu


def test_counters_made_in_inference_mode_can_be_added_to_outside_of_it():
    with torch.inference_mode():
        made = counters._counters_on.__wrapped__(torch.device("cpu"))
    made += 1

"""The figures of a layer: the sums over its launches."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.attention.cases import Work
from benchmarks.gpu_cost.gpu import Cost, Gpu
from benchmarks.gpu_cost.kernels import cost_of
from benchmarks.gpu_cost.steps import Case, GroupLaunches, Rows, record_layer


def figures(case: Case, gpu: Gpu, kernels: bool = False) -> dict[str, Any]:
    """Counts of a layer and its estimated time.

    Args:
        kernels: whether to tell what each kernel takes of it.
    """
    work, groups = case.work, record_layer(case, int(gpu.multiprocessors))
    by_kernel: dict[str, dict[str, float]] = {}
    total = np.zeros(3)
    for group in groups:
        for launch in group.launches:
            cost = cost_of(launch, group.rows, gpu)
            total += (cost.hbm_bytes, cost.l2_bytes, cost.tensor_flops)
            own = by_kernel.setdefault(launch.kernel, {"launches": 0, "estimated_us": 0.0})
            own["launches"] += 1
            own["estimated_us"] += gpu.launch_us + gpu.kernel_us(cost, launch.programs)
    hbm_bytes, l2_bytes, tensor_flops = (round(float(each)) for each in total)
    found = {
        "shape": work.shape.name,
        "step": work.name,
        "layer": case.role,
        "context": work.context,
        "captured": case.captured,
        "max_model_len": case.max_model_len,
        "launches": sum(len(group.launches) for group in groups),
        "groups": len(groups),
        "programs": sum(launch.programs for group in groups for launch in group.launches),
        "hbm_bytes": hbm_bytes,
        "l2_bytes": l2_bytes,
        "tensor_flops": tensor_flops,
        "estimated_us": round(sum(own["estimated_us"] for own in by_kernel.values()), 2),
        "floor_us": round(floor_us(work, groups, gpu), 2),
        "fa3_roofline_us": round(fa3_roofline_us(work, gpu), 2),
    }
    return found | ({"kernels": by_kernel} if kernels else {})


def fa3_roofline_us(work: Work, gpu: Gpu) -> float:
    """Least time of full attention: every key and value once, or its products, whichever is longer."""
    return gpu.ceilings.roofline_us(work.full_bytes, work.full_flops)


def floor_us(work: Work, groups: list[GroupLaunches], gpu: Gpu) -> float:
    """Least time of an exact selection, at the same rates and without a launch.

    The keys of a request's candidates are read once, and what its rows attend to.
    """
    counted = [floor_cost(work, group.rows) for group in groups]
    num_bytes = sum(cost.hbm_bytes for cost in counted)
    return gpu.ceilings.roofline_us(num_bytes, sum(cost.tensor_flops for cost in counted))


def floor_cost(work: Work, rows: Rows) -> Cost:
    shape = work.shape
    heads_size = shape.num_heads * shape.head_size
    # In a step of a batch every row is a request of its own; a prompt's rows share its keys.
    scored = rows.candidates.sum() if work.queries == 1 else rows.candidates.max(initial=0)
    seen = rows.queries * rows.lengths - rows.queries * (rows.queries - 1) // 2
    return Cost(
        hbm_bytes=float(scored + 2 * rows.lengths.sum()) * shape.token_bytes,
        tensor_flops=float(2 * rows.candidates.sum() + 4 * seen.sum()) * heads_size,
    )

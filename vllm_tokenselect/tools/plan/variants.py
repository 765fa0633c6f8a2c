"""One server with one setting changed at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from vllm_tokenselect.method.settings import SettingsError
from vllm_tokenselect.tools.plan.choice import LayoutPlan, plan_layout
from vllm_tokenselect.tools.plan.planned_server import PlannedServer


def vary(plan: LayoutPlan) -> list[tuple[str, LayoutPlan | str]]:
    """Words for each change, and the plan with it or the reason why there is none."""
    found: list[tuple[str, LayoutPlan | str]] = []
    for words, make in _changes(plan.server):
        try:
            server = make()
            if server != plan.server:
                found.append((words, plan_layout(plan.model, server, plan.layout)))
        except SettingsError:
            found.append((words, "refused"))
    return found


def _changes(server: PlannedServer) -> Iterator[tuple[str, Any]]:
    def setting(**changed: object) -> Any:
        return lambda: server.with_settings(**changed)

    for name in ("top_k", "n_local", "query_chunk"):
        value = 2 * getattr(server.config, name)
        yield f"{name} {value}", setting(**{name: value})
    yield "similarity_threshold 1", setting(similarity_threshold=1)
    for size in (128, 2048):
        yield f"workspace_mb {size}", setting(workspace_mb=size)
    yield 'positions "reassigned"', setting(positions="reassigned")
    yield 'vote "global"', setting(vote="global")
    yield "--kv-cache-dtype fp8", lambda: replace(server, kv_dtype=torch.float8_e4m3fn)
    for size in (16, 256):
        yield f"--max-num-seqs {size}", lambda size=size: replace(server, max_num_seqs=size)
    doubled = 2 * server.max_num_batched_tokens
    yield (
        f"--max-num-batched-tokens {doubled}",
        lambda: replace(server, max_num_batched_tokens=doubled),
    )

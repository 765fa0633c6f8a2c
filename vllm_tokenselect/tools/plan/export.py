"""Plans as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from vllm_tokenselect.tools.plan.choice import LayoutComparison, LayoutPlan
from vllm_tokenselect.tools.plan.models import ModelShape
from vllm_tokenselect.tools.plan.planned_server import PlannedServer
from vllm_tokenselect.tools.plan.traffic import AttendedTokens


def as_json(
    model: ModelShape, server: PlannedServer, comparisons: Sequence[LayoutComparison]
) -> dict[str, Any]:
    """Everything that was found; sizes in bytes, of one GPU."""
    attended = asdict(AttendedTokens.of(server))
    del attended["prompt_rows"]
    return {
        "model": {
            **{name: getattr(model, name) for name in ("name", "num_weights", "hidden_size")},
            **{name: getattr(model, name) for name in ("num_heads", "num_kv_heads", "head_size")},
            "num_layers": len(model.layers),
            "trained_length": model.trained_length,
        },
        "server": _server(server),
        "attended": attended,
        "comparisons": [
            {
                "gpus": comparison.gpus,
                "gpus_per_machine": comparison.gpus_per_machine,
                "recommended": comparison.recommended and asdict(comparison.recommended.layout),
                "reason": comparison.reason,
                "plans": [_plan(plan) for plan in comparison.plans],
                "refused": [
                    {"layout": asdict(layout), "reason": reason}
                    for layout, reason in comparison.refused
                ],
            }
            for comparison in comparisons
        ],
    }


def _server(server: PlannedServer) -> dict[str, Any]:
    described = {name: getattr(server, name) for name in server.__dataclass_fields__}
    return {
        **described,
        "gpu": asdict(server.gpu),
        "config": server.config.model_dump(),
        "dtype": str(server.dtype).removeprefix("torch."),
        "kv_dtype": str(server.kv_dtype).removeprefix("torch."),
    }


def _plan(plan: LayoutPlan) -> dict[str, Any]:
    return {
        "layout": asdict(plan.layout),
        "fits": plan.fits,
        "contexts": plan.contexts,
        "memory": {
            **asdict(plan.memory),
            "left": plan.memory.left,
            "missing": plan.memory.missing,
        },
        "traffic": asdict(plan.traffic),
        "global_votes": plan.votes,
        "read_in_turn": plan.read_in_turn,
    }

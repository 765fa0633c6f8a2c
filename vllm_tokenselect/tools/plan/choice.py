"""Memory and traffic of each layout, which one to take, and what to change where none fits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from vllm_tokenselect.method.settings import SettingsError
from vllm_tokenselect.tools.plan.layouts import Layout, cut_stages, find_layouts
from vllm_tokenselect.tools.plan.memory import GpuMemory, gpu_memory
from vllm_tokenselect.tools.plan.models import ModelShape
from vllm_tokenselect.tools.plan.planned_server import BLOCK_SIZE, PlannedServer
from vllm_tokenselect.tools.plan.traffic import AttendedTokens, Traffic, traffic
from vllm_tokenselect.tools.plan.units import show_bytes

# A layout with fewer GPUs per server is taken if it holds at least this share of the most contexts.
ALMOST = 0.8


@dataclass(frozen=True)
class LayoutPlan:
    """A model on GPUs in one layout.

    Attributes:
        memory: of a GPU of the stage that holds the fewest contexts.
        traffic: of a GPU of the stage that sends most.
        votes: what a GPU sends in addition for a generated token if all GPUs of a layer vote together.
        read_in_turn: bytes of weights and KV cache that the stages read one after the other for a generated
            token that selects, one GPU of each stage.
    """

    model: ModelShape
    server: PlannedServer
    layout: Layout
    memory: GpuMemory
    traffic: Traffic
    votes: int
    read_in_turn: int

    @property
    def fits(self) -> bool:
        """Whether there is room for one context."""
        return not self.memory.missing

    @property
    def server_contexts(self) -> int:
        """Contexts of full length that one replica holds."""
        return self.memory.num_contexts(self.server.max_num_seqs)

    @property
    def contexts(self) -> int:
        """Contexts of full length that all replicas hold."""
        return self.server_contexts * self.layout.replicas

    @property
    def longest_context(self) -> int:
        """Tokens that fit a GPU's memory, in whole blocks, with the buffers of this context."""
        tokens = max(self.memory.left, 0) // max(self.memory.kv_token, 1)
        return tokens // BLOCK_SIZE * BLOCK_SIZE


def plan_layout(model: ModelShape, server: PlannedServer, layout: Layout) -> LayoutPlan:
    """Memory and traffic of one layout.

    Raises:
        SettingsError: when the setting `workspace_mb` is too small for the context.
    """
    attended = AttendedTokens.of(server)
    together = server.with_settings(vote="global")
    stages = [
        (stage, gpu_memory(model, server, layout, stage))
        for stage in cut_stages(
            model.layers, layout.pp, server.config.dense_layers, server.config.anchor_layers
        )
    ]
    sent, joint = (
        [traffic(model, side, layout, stage, memory, attended) for stage, memory in stages]
        for side in (server, together)
    )
    busiest = max(sent, key=lambda found: found.decoding.total)
    votes = max(found.decoding.votes + found.decoding.queries for found in joint)
    fullest = min((memory for _, memory in stages), key=lambda m: m.left / m.kv_context)
    in_turn = sum(memory.buffers.weights for _, memory in stages)
    in_turn += sum(found.reads.selecting for found in sent)
    return LayoutPlan(model, server, layout, fullest, busiest, votes, in_turn)


@dataclass(frozen=True)
class LayoutComparison:
    """Layouts of a model on a number of GPUs.

    Attributes:
        plans: the layouts that were computed, those with the fewest GPUs per server first.
        refused: layouts whose scores do not fit the workspace, with the reason.
        gpus_per_machine: GPUs that a fast link connects.
    """

    plans: Sequence[LayoutPlan]
    refused: Sequence[tuple[Layout, str]]
    gpus: int
    gpus_per_machine: int

    @cached_property
    def recommended(self) -> LayoutPlan | None:
        """The layout to take; None when none fits.

        Servers within one machine come first. Among layouts that hold almost as many contexts as the best,
        the one with the fewest GPUs per server wins, and then the one with the fewest stages.
        """
        fitting = [plan for plan in self.plans if plan.fits]
        inside = [p for p in fitting if p.layout.server_gpus <= self.gpus_per_machine]
        compared = inside or fitting
        if not compared:
            return None
        most = max(plan.contexts for plan in compared)
        enough = [plan for plan in compared if plan.contexts >= ALMOST * most]
        return min(enough, key=lambda plan: (plan.layout.server_gpus, plan.layout.pp))

    @property
    def reason(self) -> str:
        """A sentence that says why this layout, or what is missing and what would fit."""
        plan = self.recommended
        if plan is None:
            return self._refusal
        gpus = f"{self.gpus} x {plan.server.gpu.name}"
        holds = f"{gpus}: {plan.layout} holds {_contexts(plan.contexts)} at a time"
        if len(self.plans) == 1:
            return f"{holds}."
        best = max(self.plans, key=lambda other: other.contexts)
        if plan.layout.server_gpus > self.gpus_per_machine:
            why = "no server within one machine holds even one"
        elif plan.layout.server_gpus == 1:
            why = "one GPU holds enough of them, and sends nothing to others"
        else:
            why = (
                f"{plan.layout.server_gpus} GPUs a server are the fewest that hold four fifths of what "
                "one machine's layouts can"
            )
        more = f" Most: {best.contexts}, {best.layout}." if best.contexts > plan.contexts else ""
        return f"{holds}: {why}.{more}"

    @property
    def _refusal(self) -> str:
        """What the nearest layout lacks, and what would fit."""
        plan = min(self.plans, key=lambda plan: plan.memory.missing)
        memory, server = plan.memory, plan.server
        changes = "; ".join(remedies(plan)) or "no change that was tried is enough"
        return (
            f"{plan.model.name} does not fit {self.gpus} x {server.gpu.name} ({plan.layout}): weights and "
            f"buffers take {show_bytes(memory.buffers.total)} of {show_bytes(memory.usable)} and one "
            f"context {show_bytes(memory.kv_context)} of each GPU: {show_bytes(memory.missing)} are "
            f"missing. What would fit: {changes}."
        )


def compare_layouts(
    model: ModelShape,
    server: PlannedServer,
    gpus: int,
    gpus_per_machine: int,
    tp: int | None = None,
    pp: int | None = None,
    replicas: int | None = None,
) -> LayoutComparison:
    """Compute every sensible layout, or those that the options ask for.

    Raises:
        ValueError: when there is none, or none whose scores fit the workspace.
    """
    plans, refused = [], []
    for layout in find_layouts(model, gpus, gpus_per_machine, tp, pp, replicas):
        try:
            plans.append(plan_layout(model, server, layout))
        except SettingsError as error:
            refused.append((layout, str(error)))
    if not plans:
        raise SettingsError(refused[0][1])
    return LayoutComparison(plans, refused, gpus, gpus_per_machine)


def remedies(plan: LayoutPlan) -> list[str]:
    """Changes that would make a server fit, of those that are tried here."""
    found = [words for words, changed in _changes(plan) if changed.fits]
    shorter = plan.longest_context
    if shorter:
        server = replace(plan.server, context=shorter)
        if plan_layout(plan.model, server, plan.layout).fits:
            found.append(f"--context {shorter}")
    return found


def _changes(plan: LayoutPlan) -> Iterator[tuple[str, LayoutPlan]]:
    model, server, layout = plan.model, plan.server, plan.layout
    slim = replace(server, max_num_seqs=min(server.max_num_seqs, 16))
    fp8_cache = replace(server, kv_dtype=torch.float8_e4m3fn)
    fp8_weights = replace(server, weight_bytes=min(server.weight_bytes, 1.0))
    both = replace(fp8_cache, weight_bytes=fp8_weights.weight_bytes)
    for words, changed in (
        (f"--max-num-seqs {slim.max_num_seqs}", slim),
        ("--kv-cache-dtype fp8", fp8_cache),
        ("--weights-dtype fp8", fp8_weights),
        ("--kv-cache-dtype fp8 --weights-dtype fp8", both),
    ):
        if changed != server:
            yield words, plan_layout(model, changed, layout)
    for gpus in (2, 4, 8, 16, 32, 64):
        if gpus <= layout.gpus:
            continue
        wider = [one for one in find_layouts(model, gpus, 8, replicas=1) if one.gpus == gpus]
        for larger in wider:
            try:
                changed_plan = plan_layout(model, server, larger)
            except SettingsError:
                continue
            if changed_plan.fits:
                yield f"--gpus {gpus} --tp {larger.tp} --pp {larger.pp}", changed_plan
                return


def _contexts(count: int) -> str:
    return "1 context" if count == 1 else f"{count} contexts"

"""Plans as tables, which are Markdown too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from rich import box
from rich.table import Table

from vllm_tokenselect.tools.plan.choice import LayoutComparison, LayoutPlan
from vllm_tokenselect.tools.plan.memory import RankShape, step_limits
from vllm_tokenselect.tools.plan.traffic import AttendedTokens, Network
from vllm_tokenselect.tools.plan.units import show_bytes, show_tokens

BUFFERS = {
    "weights": "weights",
    "selection_cache": "Selection Cache",
    "workspace": "workspace of scores",
    "sparse_block_table": "sparse block table",
    "gather_buffer": "gather buffer",
    "partial_outputs": "partial outputs of attention",
    "block_tables": "vLLM's block tables",
    "activations": "activations (a guess)",
    "reserve": "CUDA, NCCL, graphs (a guess)",
}


def layout_table(comparisons: Sequence[LayoutComparison]) -> Table:
    """One line for each layout. Sizes are those of one GPU; reads and sends are for one token."""
    table = _table(
        *("GPUs", "tp", "pp", "replicas", "weights", "buffers", "KV of a context", "free for KV"),
        *("contexts", "attention reads", "if full", "read in turn", "sends", "global votes"),
    )
    for comparison in comparisons:
        for plan in comparison.plans:
            layout, memory, moved = plan.layout, plan.memory, plan.traffic
            chosen = "**" if plan is comparison.recommended and len(comparison.plans) > 1 else ""
            short = f"0, {show_bytes(memory.missing)} missing"
            table.add_row(
                str(comparison.gpus),
                *(str(n) for n in (layout.tp, layout.pp, layout.replicas)),
                show_bytes(memory.buffers.weights),
                show_bytes(memory.buffers.total - memory.buffers.weights),
                show_bytes(memory.kv_context),
                show_bytes(memory.left),
                f"{chosen}{plan.contexts}{chosen}" if plan.fits else short,
                show_bytes(moved.reads.selecting),
                show_bytes(moved.reads.full),
                show_bytes(plan.read_in_turn),
                show_bytes(moved.decoding.total),
                f"+ {show_bytes(plan.votes)}",
            )
    return table


def memory_table(plan: LayoutPlan) -> Table:
    """What one GPU of the fullest stage holds."""
    table = _table(f"one {plan.server.gpu.name} of {plan.layout}", "size")
    memory = plan.memory
    table.add_row(f"usable, {plan.server.utilization:g} of it", show_bytes(memory.usable))
    for name, words in BUFFERS.items():
        table.add_row(words, show_bytes(getattr(memory.buffers, name)))
    table.add_row("left for the KV cache", show_bytes(memory.left))
    table.add_row("KV cache of a token", show_bytes(memory.kv_token))
    context = show_tokens(plan.server.context)
    table.add_row(f"KV cache of a context of {context}", show_bytes(memory.kv_context))
    table.add_row("contexts at a time, of a replica", str(plan.server_contexts))
    return table


def attention_table(plan: LayoutPlan) -> Table:
    """What one generated token at the end of the context attends to, and what a GPU reads for it."""
    attended, reads = AttendedTokens.of(plan.server), plan.traffic.reads
    context = attended.context
    table = _table(f"a token after {show_tokens(context)}", "attends to", "of the context", "reads")
    for words, tokens, size in (
        ("selects", attended.decoding, reads.selecting),
        ("reuses a selection, at most", attended.reusing, reads.reusing),
        ("full attention", context, reads.full),
    ):
        table.add_row(words, f"{tokens:,}", f"{tokens / context:.2%}", show_bytes(size))
    table.add_row("prompt, of full attention's work", "", f"{attended.prompt:.2%}", "")
    return table


def network_table(plan: LayoutPlan) -> Table:
    """What a GPU of the busiest stage sends."""
    moved, settings = plan.traffic, plan.server.config
    context = show_tokens(plan.server.context)
    table = _table(
        f'a GPU sends (vote "{plan.server.config.vote}")',
        "a token",
        f"last chunk of {settings.query_chunk}",
        f"prompt of {context}",
    )
    columns = (moved.decoding, moved.chunk, moved.prompt)
    for field in fields(Network):
        if field.name != "collectives":
            cells = (show_bytes(getattr(column, field.name)) for column in columns)
            table.add_row(field.name, *cells)
    table.add_row("together", *(show_bytes(column.total) for column in columns))
    waits = str(moved.decoding.collectives)
    table.add_row("waits for other GPUs, a step", waits, str(moved.chunk.collectives), "")
    return table


def settings_table(plan: LayoutPlan, variants: Sequence[tuple[str, LayoutPlan | str]]) -> Table:
    """What each setting costs in this layout if it alone is changed.

    Args:
        variants: words for each change, and the plan with it or the reason why there is none.
    """
    table = _table(
        *("setting", "buffers", "Selection Cache", "workspace", "scored at a time", "block tables"),
        *("gather buffer", "contexts", "attends to", "reads, selecting", "reads, reusing", "sends"),
    )
    for words, changed in [("as given", plan), *variants]:
        if isinstance(changed, str):
            table.add_row(words, changed)
            continue
        buffers, moved = changed.memory.buffers, changed.traffic
        limits = step_limits(changed.server, RankShape.of(changed.model, changed.layout.tp))
        reuses = changed.server.config.method.reuses_selections
        table.add_row(
            words,
            show_bytes(buffers.total - buffers.weights),
            show_bytes(buffers.selection_cache),
            show_bytes(buffers.workspace),
            f"{limits.score_columns:,}",
            show_bytes(buffers.sparse_block_table + buffers.block_tables),
            show_bytes(buffers.gather_buffer),
            str(changed.contexts)
            if changed.fits
            else f"0, {show_bytes(changed.memory.missing)} missing",
            f"{AttendedTokens.of(changed.server).decoding:,}",
            show_bytes(moved.reads.selecting),
            show_bytes(moved.reads.reusing) if reuses else "",
            show_bytes(moved.decoding.total),
        )
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.MARKDOWN, show_edge=True)
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table

"""Ways to spread a model over GPUs: tensor parallel, pipeline parallel, and replicas."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

from vllm_tokenselect.method.anchors import choose_anchors
from vllm_tokenselect.method.settings import AnchorLayers
from vllm_tokenselect.tools.plan.models import LayerShape, ModelShape


@dataclass(frozen=True)
class Layout:
    """Replicas of servers that spread each layer over `tp` GPUs and the layers over `pp` stages."""

    tp: int
    pp: int
    replicas: int

    @property
    def server_gpus(self) -> int:
        """GPUs that work together on a request."""
        return self.tp * self.pp

    @property
    def gpus(self) -> int:
        return self.server_gpus * self.replicas

    def __str__(self) -> str:
        server = f"tp {self.tp} x pp {self.pp}"
        return server if self.replicas == 1 else f"{server} x {self.replicas} replicas"


@dataclass(frozen=True)
class Stage:
    """The layers of one pipeline stage. The first stage has the embedding, the last one makes the logits.

    Attributes:
        dense_layers: number of the stage's first layers that the setting `dense_layers` leaves dense.
        anchors: number of the stage's layers in which a generated token selects.
    """

    layers: tuple[LayerShape, ...]
    first: bool
    last: bool
    dense_layers: int = 0
    anchors: int = 0

    @property
    def full_attention(self) -> int:
        """Layers without a sliding window."""
        return sum(layer.window is None for layer in self.layers)

    @property
    def selecting(self) -> int:
        """Layers on TOKENSELECT."""
        return sum(layer.window is None for layer in self.layers[self.dense_layers :])


def cut_stages(
    layers: tuple[LayerShape, ...],
    pp: int,
    dense_layers: int = 0,
    anchor_layers: AnchorLayers = "all",
) -> list[Stage]:
    """Cut layers into stages as vLLM does: surplus layers go to stages from the last but one backwards.

    Args:
        dense_layers, anchor_layers: the settings.
    """
    sizes = [len(layers) // pp] * pp
    for i in range(len(layers) % pp):
        sizes[-2 - i] += 1
    starts = [0, *accumulate(sizes)]
    selecting = [
        number
        for number, layer in enumerate(layers)
        if number >= dense_layers and layer.window is None
    ]
    firsts = [
        next((n for n in selecting if start <= n < end), -1) for start, end in pairwise(starts)
    ]
    anchors = choose_anchors(anchor_layers, selecting, set(firsts) - {-1})
    return [
        Stage(
            layers[start:end],
            first=start == 0,
            last=end == len(layers),
            dense_layers=min(max(dense_layers - start, 0), end - start),
            anchors=sum(start <= anchor < end for anchor in anchors),
        )
        for start, end in pairwise(starts)
    ]


def why_impossible(model: ModelShape, layout: Layout) -> str:
    """Why vLLM cannot spread a model in this layout; empty if it can."""
    tp, heads, kv_heads = layout.tp, model.num_heads, model.num_kv_heads
    if heads % tp:
        return f"tp {tp} does not divide {heads} heads"
    if max(tp, kv_heads) % min(tp, kv_heads):
        return f"tp {tp} and {kv_heads} KV heads do not divide each other"
    if layout.pp > len(model.layers):
        return f"pp {layout.pp} is more than {len(model.layers)} layers"
    return ""


def find_layouts(
    model: ModelShape,
    gpus: int,
    gpus_per_machine: int,
    tp: int | None = None,
    pp: int | None = None,
    replicas: int | None = None,
) -> list[Layout]:
    """Layouts worth comparing, those with the fewest GPUs per server first.

    Tensor parallelism stays within a machine. Pipeline parallelism adds to the widest tensor parallelism,
    or replaces it. `tp`, `pp` and `replicas` are kept if they are given, sensible or not. Replicas take the
    GPUs that are left.

    Raises:
        ValueError: when there is none.
    """
    found, reasons = [], []
    for wide, deep in _widths(model, min(gpus, gpus_per_machine), gpus, tp, pp):
        layout = Layout(wide, deep, replicas or max(gpus // (wide * deep), 1))
        reason = why_impossible(model, layout)
        if not reason and layout.gpus > gpus:
            reason = f"{layout} takes {layout.gpus}"
        if reason:
            reasons.append(reason)
        else:
            found.append(layout)
    if not found:
        # The first layout has the fewest stages: what is wrong with it is wrong with all.
        raise ValueError(f"no layout of {model.name} on {gpus} GPUs: {reasons[0]}")
    return sorted(found, key=lambda layout: (layout.server_gpus, layout.pp))


def _widths(
    model: ModelShape, machine: int, gpus: int, tp: int | None, pp: int | None
) -> Iterator[tuple[int, int]]:
    """Pairs of tensor and pipeline parallelism."""
    if tp or pp:
        for wide in [tp] if tp else _divisors(gpus):
            for deep in [pp] if pp else _divisors(gpus):
                yield wide, deep
        return
    widest = 1
    for wide in _divisors(gpus):
        if wide <= machine and not why_impossible(model, Layout(wide, 1, 1)):
            yield wide, 1
            if wide <= model.num_kv_heads:
                widest = wide
    for deep in _divisors(gpus // widest):
        if deep > 1:
            yield widest, deep
    if machine > 1 and widest > 1 and machine <= len(model.layers):
        yield 1, machine


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]

"""`tokenselect inspect`: what selection does to a model layer by layer, without a server."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from vllm_tokenselect.tools.common.files import write_json
from vllm_tokenselect.tools.inspect.layers import DIFFUSE_BELOW, compare_layers, diffuse_layers
from vllm_tokenselect.tools.inspect.passages import needle_passages
from vllm_tokenselect.tools.inspect.subject import Subject
from vllm_tokenselect.tools.inspect.tables import draw_layers, layer_table


def run_inspect(
    subject: Subject,
    prompt: Path | None,
    console: Console,
    json_path: Path | None,
    plot: Path | None,
) -> None:
    """Print the layers of a model over one prompt: the user's, or a number hidden in real text.

    Raises:
        ValueError: with a message for the user.
    """
    method, tokenizer = subject.method(), subject.tokenizer()
    if prompt is None:
        tokens = needle_passages(tokenizer, subject.length, 1, subject.seed)[0].tokens
    else:
        tokens = tokenizer(prompt.read_text())["input_ids"]
    layers = compare_layers(subject.load(), tokens, method)
    for kind in layers[0].mass:
        if layers[0].mass[kind]:
            console.print(layer_table(layers, kind))
    diffuse = diffuse_layers(layers)
    if diffuse:
        dense = json.dumps({"dense_layers": method.dense_layers + diffuse})
        console.print(
            f"The first {'layer keeps' if diffuse == 1 else f'{diffuse} layers keep'} less than "
            f"{DIFFUSE_BELOW:.0%} of the attention. To see what full attention there is worth, run "
            f"`tokenselect tune --settings '{dense}'`.",
            highlight=False,
            markup=False,
        )
    if plot is not None:
        draw_layers(layers, plot)
        console.print(f"Drawn into {plot}", highlight=False)
    found = {"tokens": len(tokens), "layers": [asdict(layer) for layer in layers]}
    write_json(json_path, subject.described(method) | found)

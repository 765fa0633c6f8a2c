"""How much sooner does the first token come when a prompt's beginning was offloaded?

    python -m benchmarks.offload --json benchmarks/results/offload.json

SmolLM2 reads prompts that are longer than it was trained for (positions are reassigned), on a
server whose KV cache holds one of them. Each prompt is sent twice in turn, and then all again: first it is
computed, then it comes from the cache, and at last from host memory. A second server with the same folder
finds it in files. Whatever is found, the same tokens have to be generated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import openai
from transformers import AutoTokenizer

from benchmarks.report import SMOLLM2, open_cells
from tests.models.shortened import first_layers
from tests.oracle.prompts import prompt_tokens
from vllm_tokenselect.tools.common.server import VllmServer
from vllm_tokenselect.tools.common.smollm2 import ensure_smollm2
from vllm_tokenselect.tools.evaluate.cells import Cell

BLOCK = 128
KV_NUMBERS = 3 * 64 * 2  # of a token in a layer of SmolLM2-135M


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--length", type=int, default=16384, help="tokens of a prompt")
    parser.add_argument("--prompts", type=int, default=3, help="how many prompts")
    parser.add_argument("--layers", type=int, default=30, help="first layers of the model")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--json", type=Path, help="write every result to this file as it comes")
    return parser.parse_args()


def start(model: Path, folder: Path, args: argparse.Namespace) -> VllmServer:
    length, itemsize = args.length, 2 if args.dtype == "bfloat16" else 4
    extra = {
        "spec_name": "CpuOffloadingSpec",
        "spec_module_path": "vllm_tokenselect.backend.cpu_offloading",
        "cpu_bytes_to_use": (args.prompts + 1) * length * args.layers * KV_NUMBERS * itemsize,
        "secondary_tiers": [{"type": "fs", "root_dir": str(folder)}],
    }
    transfer = {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": extra,
    }
    blocks = (length + 512) // BLOCK + 2
    return VllmServer(
        model,
        settings={"positions": "reassigned"},
        extra_args=(
            *("--dtype", args.dtype, "--max-num-seqs", "2", "--max-model-len", str(length + 256)),
            *(
                "--num-gpu-blocks-override",
                str(blocks),
                "--kv-transfer-config",
                json.dumps(transfer),
            ),
        ),
    )


def ask(server: VllmServer, prompt: list[int]) -> tuple[float, list[str]]:
    """Seconds to the first token of a greedy answer, and its tokens."""
    client = openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", timeout=3600)
    begin, first, said = time.perf_counter(), 0.0, []
    stream: Any = client.completions.create(
        model=server.model,
        prompt=prompt,
        max_tokens=8,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    for part in stream:
        first = first or time.perf_counter() - begin
        said.append(part.choices[0].text)
    return first, said


def main() -> int:
    args = arguments()
    whole = ensure_smollm2(progress=False)
    tokenizer = AutoTokenizer.from_pretrained(whole)
    prompts = [prompt_tokens(tokenizer, seed, args.length) for seed in range(args.prompts)]
    fixed = {"model": f"{SMOLLM2}, {args.dtype}", "layers": args.layers, "length": args.length}
    cells = open_cells(args.json, fixed, resume=False)
    answers: dict[str, list[list[str]]] = {}
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = first_layers(whole, Path(folder) / "model", args.layers)
        for rounds in ((("computed", "cache"), ("host memory",)), (("files",),)):
            with start(model, Path(folder) / "kv", args) as server:
                ask(server, prompts[0][:700])  # what the first request warms up
                for ways in rounds:
                    for index, way in ((i, way) for i in range(len(prompts)) for way in ways):
                        first, said = ask(server, prompts[index])
                        seconds.setdefault(way, []).append(first)
                        answers.setdefault(way, []).append(said)
                        cells.add(Cell(way, "prompt", args.length, index), {"seconds": first})
                        print(
                            f"{way}: prompt {index}: {first:.2f} s to the first token", flush=True
                        )
    summary = [
        {
            "way": way,
            "median seconds": statistics.median(times),
            "times sooner": statistics.median(seconds["computed"]) / statistics.median(times),
            "same tokens as computed": answers[way] == answers["computed"],
            "same tokens as from the cache": answers[way] == answers["cache"],
        }
        for way, times in seconds.items()
    ]
    cells.write(summary)
    print(json.dumps(summary, indent=2))
    found = ("cache", "host memory", "files")
    return 0 if all(answers[way] == answers["cache"] for way in found) else 1


if __name__ == "__main__":
    sys.exit(main())

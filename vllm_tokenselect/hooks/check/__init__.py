"""Check a vLLM release that is not installed: `python -m vllm_tokenselect.hooks.check --version V`.

release    Does every seam hold? Does every diff of `patches/V` apply, so that its seams say `patched`?
names      Does every name exist that the package uses of vLLM? Asks a type checker.
start      Does it start, as far as that goes without a model? Stand-ins (`stand_ins`, `stand_in_nvml`)
           take the place of what is compiled; `rehearsal` is what then runs.
"""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2]
REPOSITORY = PACKAGE.parent

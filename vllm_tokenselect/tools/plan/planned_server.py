"""How vLLM would be started: the GPU, the longest context, the batch, and the settings."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from vllm_tokenselect.config import TokenSelectConfig
from vllm_tokenselect.gpu.flash_attention import reads_in_place
from vllm_tokenselect.tools.plan.units import parse_bytes

BLOCK_SIZE = 16  # of vLLM's KV cache on a GPU
GIB = 1 << 30

WEIGHT_BYTES = {
    **dict.fromkeys(("float32", "fp32"), 4.0),
    **dict.fromkeys(("bfloat16", "bf16", "float16", "fp16"), 2.0),
    **dict.fromkeys(("fp8", "int8"), 1.0),
    **dict.fromkeys(("fp4", "int4"), 0.5),
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    Attributes:
        memory: bytes.
        flash_attention: version that vLLM takes there.
    """

    name: str
    memory: int
    flash_attention: int

    @property
    def batch(self) -> tuple[int, int]:
        """vLLM's defaults of `--max-num-batched-tokens` and `--max-num-seqs` for a server."""
        if self.memory >= 160 * GIB:
            return 16384, 1024
        if self.memory >= 70 * GIB and not self.name.startswith("a100"):
            return 8192, 1024
        return 2048, 256


# Memory as the driver reports it, a little below the name's.
GPUS = {
    "a100-40gb": Gpu("a100-40gb", 39 * GIB, 2),
    "a100": Gpu("a100", 79 * GIB, 2),
    "h100": Gpu("h100", 79 * GIB, 3),
    "h200": Gpu("h200", 139 * GIB, 3),
    "b200": Gpu("b200", 178 * GIB, 4),
}


def find_gpu(text: str) -> Gpu:
    """A kind of GPU by its name, or one of the given memory, on which attended tokens are gathered.

    Raises:
        ValueError: when the text is neither.
    """
    if text.lower() in GPUS:
        return GPUS[text.lower()]
    try:
        return Gpu(text, parse_bytes(text), 2)
    except ValueError as error:
        raise ValueError(f"--gpu-memory: {error}, nor one of {', '.join(GPUS)}") from None


@dataclass(frozen=True)
class PlannedServer:
    """One vLLM server, all of its GPUs alike.

    Attributes:
        gpu: the kind.
        context: tokens of the longest context, `--max-model-len`.
        max_num_seqs, max_num_batched_tokens: as vLLM has them.
        dtype: of activations, embeddings and norms.
        kv_dtype: of the KV cache.
        weight_bytes: bytes of a weight in a layer's matrices.
        config: settings of TOKENSELECT.
        utilization: share of the memory that vLLM may use.
        reserve: bytes for CUDA, NCCL and CUDA graphs. A guess.
    """

    gpu: Gpu
    context: int
    max_num_seqs: int
    max_num_batched_tokens: int
    dtype: torch.dtype
    kv_dtype: torch.dtype
    weight_bytes: float
    config: TokenSelectConfig
    utilization: float = 0.9
    reserve: int = 2 * GIB

    def __post_init__(self) -> None:
        if not 0 < self.utilization <= 1:
            raise ValueError(
                f"--gpu-memory-utilization {self.utilization} is no share: it must be above 0 and at most 1"
            )
        self.config.check_engine(
            block_size=BLOCK_SIZE,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_num_seqs=self.max_num_seqs,
        )

    @property
    def attends_in_place(self) -> bool:
        """Whether attention reads selected tokens where they lie in the cache."""
        method = self.config.method
        flash = self.config.attention in ("auto", "flash") and self.dtype != torch.float32
        as_cached = self.kv_dtype.itemsize > 1 and not method.reassigns_positions
        return reads_in_place(self.gpu.flash_attention if flash else None, as_cached)

    @property
    def decodes_in_place(self) -> bool:
        """Whether that is so in decoding, where there is an own kernel."""
        return self.attends_in_place or self.config.attention == "auto"

    def with_settings(self, **changed: object) -> PlannedServer:
        """The same server with some settings changed.

        Raises:
            SettingsError: for settings that cannot be used.
        """
        given = {**self.config.model_dump(exclude_unset=True), **changed}
        return replace(self, config=TokenSelectConfig.from_mapping(given))

    @property
    def usable(self) -> int:
        """Bytes of a GPU that vLLM may use."""
        return int(self.gpu.memory * self.utilization)


def weight_bytes(text: str) -> float:
    """Bytes of a weight: the name of a dtype, or a number.

    Raises:
        ValueError: when the text is neither.
    """
    try:
        size = WEIGHT_BYTES.get(text.lower()) or float(text)
    except ValueError:
        size = 0.0
    if not 0 < size <= 8:
        raise ValueError(
            f"--weights-dtype {text!r}: bytes of a weight, such as 0.55, or {', '.join(WEIGHT_BYTES)}"
        )
    return size

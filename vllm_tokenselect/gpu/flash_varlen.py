"""The call of FlashAttention, with the sinks and the soft cap of a layer.

A sink is a logit of a head that adds to the denominator of its softmax, as one more key without a value
would. Versions 3 and 4 take sinks. Others return the logarithm of the denominator without them, `lse`: a
query's output is then `sigmoid(lse - sink)` of what it is without, exactly.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

# Version 3 keeps sinks in shared memory, for so many heads.
MOST_HEADS = 64


class VarlenFunction(Protocol):
    """What is handed to `flash_attn_varlen_func` of vLLM's `vllm_flash_attn`.

    The check of a new vLLM release holds vLLM's function against it.
    """

    def __call__(
        self,
        *,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        max_seqlen_q: int,
        seqused_k: torch.Tensor,
        max_seqlen_k: int,
        block_table: torch.Tensor,
        softmax_scale: float,
        softcap: float,
        causal: bool,
        out: torch.Tensor,
        num_splits: int,
        fa_version: int,
        s_aux: torch.Tensor | None = None,
        return_softmax_lse: bool = False,
    ) -> Any: ...


def takes_sinks(version: int, num_heads: int) -> bool:
    """Whether this version of FlashAttention takes the sinks of so many heads."""
    return version == 4 or (version == 3 and num_heads <= MOST_HEADS)


def attend_with_sinks(
    varlen: VarlenFunction,
    version: int,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    **arguments: Any,
) -> None:
    """Call FlashAttention.

    Args:
        varlen: `flash_attn_varlen_func` of vLLM's `vllm_flash_attn`.
        version: of FlashAttention.
        sinks: fp32, bf16 or fp16 [Hq]; None where heads have none.
        out: [T, Hq, D], written for the queries of rows.
        cu_seqlens_q: int32 [R + 1], where the queries of each row start.
        arguments: all others.
    """
    arguments |= {"out": out, "cu_seqlens_q": cu_seqlens_q, "causal": True, "fa_version": version}
    if sinks is None:
        varlen(**arguments)
    elif takes_sinks(version, out.shape[1]):
        # Version 3 reads sinks of bf16 only.
        varlen(s_aux=sinks.to(torch.bfloat16) if version == 3 else sinks, **arguments)
    else:
        _, lse = varlen(return_softmax_lse=True, **arguments)
        _weigh(out, lse, sinks, cu_seqlens_q)


def _weigh(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor, starts: torch.Tensor) -> None:
    """Leave the sinks their share of the weights: of outputs [T, Hq, D], given `lse` fp32 [Hq, T].

    Only for queries of rows: others have no `lse`, and their outputs may be those of an earlier call.
    """
    query = torch.arange(len(out), device=out.device)
    other = (query < starts[0]) | (query >= starts[-1])
    weights = torch.sigmoid(lse.T - sinks).masked_fill_(other[:, None], 1.0)  # [T, Hq]
    out.mul_(weights[..., None])

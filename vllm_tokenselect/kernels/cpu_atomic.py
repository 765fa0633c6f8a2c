"""What threads of one parallel loop tell each other."""

# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

from numba import types
from numba.extending import intrinsic


@intrinsic
def count_up(typingctx, counters, index):
    """Add one to `counters[index]` (int64) as one step; returns what it was.

    What a thread wrote before it counted is seen by the threads that count later.
    """

    def codegen(context, builder, sig, args):
        counters, index = args
        data = context.make_array(sig.args[0])(context, builder, counters).data
        pointer = builder.gep(data, [index])
        return builder.atomic_rmw("add", pointer, index.type(1), "acq_rel")

    return types.int64(counters, types.intp), codegen

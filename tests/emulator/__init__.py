"""Runs the PTX that Triton compiles for sm_90 on a CPU, warp by warp, and checks every access.

`parse` reads the text, `translate` writes a Python generator for it by the table of `instructions`,
`run` runs the generators of all warps in an order that a seed decides, and `driver` stands in the place
of Triton's driver, so that kernels are launched as ever. `plugin` is pytest's:

    python -m pytest -p tests.emulator.plugin tests/kernels_gpu

What it sees that Triton's interpreter does not: what the compiler made of a kernel, a missing barrier, an
order of warps or programs that was not meant, accesses out of bounds or not aligned, and products of bf16.
What it does not see: the memory of a GPU is weaker than this one, in which whatever a warp has written is
there for all others at once; a `wgmma` reads shared memory when it is issued.
"""

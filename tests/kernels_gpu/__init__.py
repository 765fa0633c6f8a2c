"""Triton kernels against their oracles: on a GPU where there is one, interpreted where there is none."""

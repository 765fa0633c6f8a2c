"""Whole steps on Triton kernels: on a GPU where there is one, interpreted where there is none."""

"""Gather cached tokens into contiguous buffers."""

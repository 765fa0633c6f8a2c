"""Rotate queries and keys to positions (RoPE, arXiv 2104.09864) that are given to them anew."""

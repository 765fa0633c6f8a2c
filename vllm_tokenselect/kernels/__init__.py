"""Operations of token selection, one folder each.

`reference.py` is the readable PyTorch definition and the tests' oracle, `cpu.py` the fast version on a
CPU, `gpu.py` the one on a GPU. Importing this package needs torch only; the `cpu` modules import numba,
the `gpu` modules Triton.

Shapes shared by all of them: `kv_cache` is `[num_blocks, num_kv_heads, 2, block_size, head_size]` with
keys at index 0 and values at index 1 of dimension 2, contiguous on a CPU and of any strides on a GPU;
`slot = block_id * block_size + offset`; query head `h` reads KV head `h // (num_heads / num_kv_heads)`.
"""

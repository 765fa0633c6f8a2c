"""Operations of token selection, one folder each.

`reference.py` is the readable PyTorch definition and the tests' oracle, `cpu.py` the fast version on a
CPU. Importing this package needs torch only; numba is imported by the `cpu` modules.

Shapes shared by all of them: `kv_cache` is contiguous `[num_blocks, num_kv_heads, 2, block_size,
head_size]` with keys at index 0 and values at index 1 of dimension 2; `slot = block_id * block_size +
offset`; query head `h` reads KV head `h // (num_heads / num_kv_heads)`.
"""

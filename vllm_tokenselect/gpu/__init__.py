"""The steps of a GPU: the same plan and the same operations, decided on the device.

rows        the rows of one step as device tensors, in groups that fit the workspace
workspace   the buffers, allocated once and shared by layers
step        decide -> mean query -> score -> vote -> table -> finish -> attention, group by group
attention   libraries that attend: PyTorch's SDPA; beside it FlashAttention and xformers

Nothing here reads a value back from the device: whether a row selects or sees its whole context is
decided by the kernels, and so is which selections are reused; a step can be captured in a CUDA graph.
"""

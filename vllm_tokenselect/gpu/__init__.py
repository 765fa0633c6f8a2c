"""The steps of a GPU: the same plan and the same operations as on a CPU, decided on the device.

cutting     the host cuts the rows of a step into groups and passes that fit the workspace
sending     the host packs what it knows of the rows, and sends it in one copy
rows        the groups of rows as the layers see them
limits      what the buffers are cut for
workspace   the buffers, allocated once and shared by layers
step        decide -> score -> vote -> build the table -> finish -> attend, group by group
attention   what attends over the table; masked, plain, flash_attention and xformers are the libraries,
            decoding_attention the own kernel
graph_size  how many kernels a CUDA graph launches
warmup      compiles the kernels at server start

Nothing here reads a value back from the device: whether a row selects or sees its whole context is
decided by the kernels, and so is which selections are reused; a step can be captured in a CUDA graph.
"""

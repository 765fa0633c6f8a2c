"""What a model on TOKENSELECT takes of GPU memory and network, before it is served.

models     the shape of a model and the number of its weights
server     how vLLM would be started: GPU, context, batch, settings
layouts    ways to spread a model over GPUs
memory     what a GPU holds, from the very buffers that a server allocates
traffic    what a GPU reads of its memory and sends to others
choice     all of it for each layout, and which layout to take
report     tables

It is a model of memory and traffic, not of time. Nothing here imports vLLM.
"""

"""How much GPU memory and network a model on TOKENSELECT needs: `tokenselect plan`.

models          the shape of a model and the number of its weights
planned_server  how vLLM would be started: GPU, context, batch, settings
layouts         ways to spread a model over GPUs
memory          what a GPU holds, from the same buffers that a server allocates
traffic         what a GPU reads from its memory and sends to others
choice          memory and traffic of each layout, and which layout to take
variants        the same server with one setting changed at a time
tables, export  plans as tables and as JSON
command         the command

Memory and traffic are computed, time is not. Nothing here imports vLLM.
"""

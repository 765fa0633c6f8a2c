"""What selection does to a model, layer by layer: a forward of the model itself, without a server.

`model.py` runs any causal language model of transformers with attention of our own; `selections.py` has
the ways to select, `layers.py` compares them in every layer, `losses.py` in what the model predicts.
"""

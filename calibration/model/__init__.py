"""In: a directory of 16-bit weights, and text. Out: decoder layers that compute, one in memory at a time, and token
sequences.

Read description.py first: what is known of a model from its config.json. families/ has what differs between
architectures, weight_files.py and weights.py read tensors, layerwise.py runs the layers, activations.py keeps hidden
states between them.
"""

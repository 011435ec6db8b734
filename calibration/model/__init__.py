"""In: a model, in a directory or on the hub, and text. Out: decoder layers that compute, one in memory at a time, and
token sequences.

Read description.py first: what is known of a model from its config.json. folder.py finds its files, families/ has what
differs between architectures, weight_files.py and weights.py read tensors, layerwise.py runs the layers, activations.py
keeps hidden states between them.
"""

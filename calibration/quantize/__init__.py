"""In: a model, a plan, token sequences. Out: the tensors of a checkpoint, one decoder layer after another.

Read layer.py first: one layer, experts and linears, on what the quantised layers below produce. checkpoint_run.py goes
through all of them and writes what is finished, and quantises the output head where a plan says so.
"""

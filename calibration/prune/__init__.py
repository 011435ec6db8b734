"""In: a checkpoint and text. Out: a rule by which tokens skip experts they need least, written into the checkpoint.

Read prune.py first. costs.py measures what dropping an expert costs a token, odp.py and otp.py are the two kinds of
rule, layer_scales.py weighs layers against each other, rules.py brings them together.
"""

"""In: a model or a checkpoint. Out: what it scores, holds and needs.

Read scores.py first: perplexity, KL and agreement. checkpoint_weights.py reads a checkpoint as float weights,
experts_forward.py computes with them as the kernels do; inspection.py looks at files, resources.py estimates memory
and time before anything is downloaded, model_card.py writes README.md.
"""

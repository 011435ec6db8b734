"""In: a quantised checkpoint and its 16-bit model. Out: the checkpoint with norms that fit it.

Read tuning.py first: a few steps down the gradient of the KL divergence to the 16-bit model. streaming.py computes that
gradient with one decoder layer in memory at a time.
"""

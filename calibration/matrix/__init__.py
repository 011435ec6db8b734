"""In: one float32 matrix, and second moments of its inputs. Out: codes, scales and zeros at a bit-width, and their
error.

Read grids.py first: what a width can represent. gptq.py chooses codes in order, refinement.py improves them,
two_sided.py does so knowing which outputs the loss feels; row_loops.py has the inner loops, compiled. trellis.py does
all of that for trellis codes, with trellis_loops.py and trellis_step.py. linears.py has the packed linears of
compressed-tensors.
"""

"""In: factors and a budget of bits. Out: plan.json, the bit-width of every expert.

Read program.py first: the integer program. problem.py states it, core.py reduces large ones, bits.py counts what is
written, size.py reads sizes as people write them, plan.py is the file; sweep.py asks for many budgets at
once, ranges.py reads which.
"""

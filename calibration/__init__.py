"""Quantising a model, as a house: one room, a package, per step, in the order in which data walks through them.

    common -> model -> matrix -> recipes -> checkpoint -> measure -> allocate -> quantize -> evaluate -> tune
        -> prune -> push -> report -> pipeline

A room imports from those before it only. pipeline.py tells the story; docs/design.md has the plan of the house.
"""

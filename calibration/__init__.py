"""Offline: measure experts, allocate bits, quantise, write the checkpoint, evaluate."""

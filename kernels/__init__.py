"""Grouped GEMM over experts of different bit-widths."""

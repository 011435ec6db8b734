"""Mixture-of-experts models whose experts each have their own bit-width, quantised offline and served by vLLM."""

__version__ = "0.1.0"

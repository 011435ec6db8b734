"""Calibrating online pruning: which selected experts a token can do without (docs/method.md, section 5)."""

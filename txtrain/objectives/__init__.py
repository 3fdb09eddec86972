"""Losses: a batch becomes named terms, each a sum over the global batch divided by its own denominator."""

"""Heads over the vocabulary and over classes, and the cross-entropy that never holds all logits."""

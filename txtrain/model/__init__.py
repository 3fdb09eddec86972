"""Transformers from options of a few axes: each option's config (no torch) beside its module.

`block.py` is where the axes meet. Losses over a batch are objectives/; nothing here knows Hydra or Lightning."""

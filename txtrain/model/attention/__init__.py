"""Attention: its variants, its kernels and which of them is taken, masks, and the cache of decoding."""

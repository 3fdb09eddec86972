"""Samples of a tokenised text, of pairs and of images, and the order in which they are read."""

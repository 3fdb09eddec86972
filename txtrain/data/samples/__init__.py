"""Samples of tokenised text, pairs and images, and their order."""

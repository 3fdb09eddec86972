"""Embeddings: tokens or patches become vectors."""

"""Tokens on disk: written once, mapped, split, streamed; formats of others."""

"""Tokens on disk, written once and memory-mapped; the split; streams; formats of other tools."""

"""Tokenizers: trained, read from files of others, or plain bytes."""

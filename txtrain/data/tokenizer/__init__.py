"""Tokenizers: trained, loaded, or plain bytes."""

"""Conversations: rows to messages, by a template to tokens, some of which are trained. Not: where rows are from."""

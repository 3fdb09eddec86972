"""Conversations: rows become messages, a template makes tokens of them, some of which are trained. Not: where rows are from."""

"""Conversations: rows of files become messages, a template makes tokens of them, and some of these are trained. Not: where the rows come from."""

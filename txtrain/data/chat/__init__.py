"""Conversations: from rows to messages, and by a template to tokens, some of which are trained. No sources of rows."""

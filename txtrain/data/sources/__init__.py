"""Where documents, pairs and images come from: files, the hub, packages. Text, not tokens."""

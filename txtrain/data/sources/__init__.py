"""Sources of documents, pairs and images: files, the hub, packages. Text, not tokens."""

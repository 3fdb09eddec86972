"""Feed-forward networks: dense, gated, mixtures of experts, and the balancing of experts."""

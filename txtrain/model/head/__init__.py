"""What leaves the last block: logits and scores, and the cross-entropy that never holds all logits."""

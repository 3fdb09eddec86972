"""What enters the first block: tokens or patches as vectors."""

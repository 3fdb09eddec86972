"""The memory of a component's forward and backward, as operations whose bytes are known. No torch."""

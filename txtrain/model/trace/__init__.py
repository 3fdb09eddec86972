"""What a component's forward and backward hold, in operations whose bytes are known: the words of a config's `trace`. No torch."""

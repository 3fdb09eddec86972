"""What is measured and shown during training: metrics, console, speed, spikes, loggers/. No step depends on it."""

"""What is measured and shown while a run trains: metrics, console, speed, spikes, loggers/. No step depends on it."""

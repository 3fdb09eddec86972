"""The command line: verbs, help, sweeps and exit codes. Runs are in training/, configurations in config/."""

"""The verbs, from the words that were typed to an exit code, and sweeps over them.

What a run, a plan or a configuration is stands in the packages of these names."""

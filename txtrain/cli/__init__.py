"""The verbs, from the words that were typed to an exit code, and sweeps over them.

What a run or a configuration is stands in the packages of these names, a plan's figures in planning/."""

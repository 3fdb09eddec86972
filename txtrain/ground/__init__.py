"""What every room stands on: typed conversion, strict reading of foreign files, whole writes, SLURM's environment; nothing of models or runs."""

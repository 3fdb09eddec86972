"""Used by all rooms: typed conversion, strict reading of foreign files, atomic writes, SLURM. No models or runs."""

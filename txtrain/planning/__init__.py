"""`txtrain plan`: parameters, FLOPs, time and memory of a run, before it runs and without torch; bytes in memory/."""

"""`txtrain plan`: parameters, FLOPs, time and memory (in memory/) of a run before it runs. No torch."""

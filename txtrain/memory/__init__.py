"""Memory and messages of a training step, before it runs.

tape        bytes of a forward and its backward, as autograd holds them; no torch
parts       attention, rotations and gates in the tape's operations; a component's own `trace` stands in its config
model       the whole model's forward
batch       what a micro-batch holds, by objective
travel      what goes to experts that are divided over processes
count       one process of a strategy: states, tape, gathering and reduction
fit         the largest micro-batch, and what makes a run fit
simulate    the same seen on the real, wrapped model with fake tensors; needs torch
"""

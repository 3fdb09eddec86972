"""Several processes as one run: which there are (world), what they ask of each other (base), how a model lies over them.

config      the strategies' knobs, and what a layout of processes must divide; no torch
world       this process' place among the others, from the launcher's environment; no torch
base        what the training step asks of a strategy; one process answers trivially
mesh        ddp, fsdp, hsdp, tp, fsdp_tp: FSDP2 and DTensor over a mesh of replicate x shard x tensor
deepspeed   deepspeed_stage_1, _2, _3: ZeRO over the same processes
partitions  which elements of each parameter ZeRO keeps where, and how a checkpoint's tensors are made of them
cuttable    what tensor parallelism must be able to divide; no torch
tensor      each layer's matrices in parts, by component type; parts, lanes: what it reads and how activations pass
experts     whole experts in each process, to which tokens travel
clipping    the norm of gradients that lie in parts
sharding    `fully_shard` by block, and initial values that do not depend on it
"""

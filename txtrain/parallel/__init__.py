"""Several processes as one run: starting them, their places, how a model lies over them, what they exchange.

config              the strategies' knobs, and what a layout of processes must divide; no torch
world               this process' place among the others, from the launcher's environment; no torch
launch              processes that the command line starts itself
one_process         what the training step asks of a strategy; one process answers trivially
mesh                ddp, fsdp, hsdp, tp, fsdp_tp: FSDP2 and DTensor over a mesh of replicate x shard x tensor
deepspeed           deepspeed_stage_1, _2, _3: ZeRO over the same processes
deepspeed_layout    which elements of each parameter ZeRO keeps where, and how a checkpoint's tensors are made of them
divisibility        what ranks that share a model must divide of it, as its components declare; no torch
tensor_parallel     each layer's matrices in parts, as its components declare
dtensor_parts, tensor_collectives   the parts that a module reads, and how activations pass
expert_parallel     whole experts in each process, to which tokens travel
grad_norm           the norm of gradients that lie in parts
fsdp                `fully_shard` by block, and initial values that do not depend on it
"""

"""Memory and messages of a training step, before it runs.

What a component computes is said by its config's `trace`, in the operations of model/trace/.

forward             the whole model's forward
batch_shapes        what a micro-batch holds, as its objective says
replicated, fsdp, zero12, zero3     what a process holds and sends, by strategy
tensor_parallel, expert_parallel    what is divided, and what it adds
optimizer           states and temporaries of an update
count               one process of a strategy: states, tape, gathering and reduction
fit                 the largest micro-batch, and what makes a run fit
"""

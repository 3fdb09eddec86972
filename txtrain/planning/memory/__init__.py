"""Memory and communication of a training step, before it runs.

A component's config states its work as `trace`, in the operations of model/trace/.

forward             the whole model's forward
batch_shapes        contents of a micro-batch, from the objective
replicated, fsdp, zero12, zero3     what a rank holds and sends, by strategy
tensor_parallel, expert_parallel    what they divide, and what they add
optimizer           states and temporaries of an update
count               one rank of a strategy: states, tape, gathering and reduction
fit                 the largest micro-batch, and what makes a run fit
"""

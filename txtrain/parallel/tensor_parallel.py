"""Tensor parallelism, applied from outside: ranks share each layer's matrices, and the stream between by positions.

A parameter becomes a DTensor, which tells checkpoints, optimizers and FSDP how it is sharded; its module reads this
rank's part (dtensor_parts.py). So a component computes as always, with fewer heads or a narrower hidden layer;
tensor_collectives.py has what is added where activations pass between ranks.

A component declares what is cut and how (`txtrain.registry.Cut`): attention by heads, FFN by its hidden size, embedding
and output matrix by the vocabulary. All else within a block (norms, dropout, residuals) is divided by positions; a
component that declares nothing reads all positions, and its matrices stay whole.
"""

# B batch, T positions, P positions of one rank, D model size, N heads, K key-value heads, V vocabulary

from __future__ import annotations

import contextlib
import dataclasses as dc
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from txtrain.model.adapter import factor_of
from txtrain.model.block import Block
from txtrain.model.context import AnyContext, CrossContext
from txtrain.model.head.heads import LMHead
from txtrain.model.lora import AdaptedLinear, product
from txtrain.model.position.encodings import Position
from txtrain.parallel.divisibility import shared_heads
from txtrain.parallel.dtensor_parts import ROWS, VocabularyPart, own_parameters, place, rows_here, wrap
from txtrain.parallel.grad_norm import clip
from txtrain.parallel.gradient_buckets import GradientBuckets, local
from txtrain.parallel.tensor_collectives import Lanes
from txtrain.registry import Cut as CutRules
from txtrain.registry import How, cut_of

Forward = Callable[..., Any]


def cut(model: nn.Module, mesh: DeviceMesh) -> Cut:
    """Cut the model over a one-dimensional mesh, in place; it is on the meta device, or equal on all ranks."""
    made = Cut(model, Lanes(mesh))
    made.vocabulary()
    made.blocks()
    made.positions()
    made.rest()
    return made


class Cut:
    """A model that is cut. replicated: owner and name of each whole parameter, and the weight of its gradient."""

    def __init__(self, model: nn.Module, lanes: Lanes) -> None:
        self.model, self.lanes = model, lanes
        self.config: Any = model.config
        self.replicated: list[tuple[nn.Module, str, float]] = []
        self._length = 0  # positions of the current block
        self._common_seed = 0  # of the current block, equal on all ranks
        self._buckets: GradientBuckets | None = None

    def vocabulary(self) -> None:
        tables, parameters = cut_of("embedding", self.config.embedding), cut_of("head", self.config.head)
        children: list[tuple[str, Any]] = list(self.model.named_children())
        for name, module in children:
            if name in ("embedding", "encoder_embedding"):
                for table in map(module.get_submodule, tables):
                    self._place(table, weight=Shard(0))
                    wrap(table, "forward", self._looked_up, table)
            elif name == "head":
                for over_words in (part for part in module.modules() if isinstance(part, LMHead)):
                    n = self.config.vocab_size
                    self._place(over_words, **dict.fromkeys(parameters, Shard(0)))
                    over_words.vocabulary = VocabularyPart(self.lanes, n)
                    wrap(over_words, "entering", lambda entering, x: self.lanes.spread(entering(x)))
                    wrap(over_words, "forward", lambda forward, *args, n=n: self.lanes.classes(forward(*args), n))

    def _looked_up(self, token: nn.Embedding, forward: Forward, ids_BT: Tensor) -> Tensor:
        """Each rank looks up the tokens that it has; other vectors are 0, and the ranks' are summed."""
        rows_BT, is_here_BT = rows_here(ids_BT, self.lanes, token.num_embeddings, len(token.weight))
        padding = token.padding_idx
        if padding is not None:
            padding -= self.lanes.rank * -(-token.num_embeddings // self.lanes.size)
            padding = padding if 0 <= padding < len(token.weight) else None
        x_BTD = F.embedding(rows_BT, token.weight, padding)
        return self.lanes.summed(x_BTD.masked_fill(~is_here_BT[..., None], 0.0))

    def positions(self) -> None:
        """Gradients of what it gives to the blocks are summed over ranks; a table is cut by heads if attention is."""
        by_heads = cut_of("attention", self.config.attention)
        tables = cut_of("position", self.config.position) if by_heads else ()
        for module in self.model.modules():
            if isinstance(module, Position) and tables:
                for table in map(module.get_submodule, tables):
                    self._place(table, weight=Shard(1))
            elif isinstance(module, Position):
                wrap(module, "bias", self._spread)
                wrap(module, "rotation", self._spread)

    def _spread(self, hook: Forward, *args: Any) -> Any:
        made = hook(*args)
        if made is None or isinstance(made, Tensor):
            return None if made is None else self.lanes.spread(made)
        return type(made)(*map(self.lanes.spread, made))

    def blocks(self) -> None:
        chains = [[m for m in module.children() if isinstance(m, Block)] for module in self.model.modules()]
        for chain in filter(None, chains):
            for block in chain:
                for name, axis in block.sublayers.items():
                    self._cut_sublayer(block.get_submodule(name), axis)
                wrap(block, "forward", self._through_block, chain[0] is block, chain[-1] is block)

    @partial(torch.compiler.disable, recursive=False)  # only its callees are compiled: this changes global state
    def _through_block(self, first: bool, last: bool, forward: Forward, x: Tensor, context: Any) -> Tensor:
        """The first block of a stack takes all positions, the last one returns them; between, each rank has its own."""
        self._length = context.mask.declared.n_queries
        x = self.lanes.split(x) if first else x
        with self._random_numbers(own=True):
            x = forward(x, context=context)
        return self.lanes.join(x, self._length) if last else x

    @contextlib.contextmanager
    def _random_numbers(self, own: bool) -> Iterator[None]:
        """Random numbers for dropout. own: this rank's, for its positions, heads and hidden units; else all ranks'."""
        if not torch.is_grad_enabled():
            yield
            return
        on_gpu = self.lanes.mesh.device_type == "cuda"
        if own:
            self._common_seed = int(torch.randint(0, 2**62, ()))
        self._common_seed += self.lanes.size + 1
        seed = self._common_seed + (1 + self.lanes.rank if own else 0)
        with torch.random.fork_rng([torch.cuda.current_device()] if on_gpu else []):
            torch.default_generator.manual_seed(seed)
            if on_gpu:
                torch.cuda.manual_seed(seed)
            yield

    def _cut_sublayer(self, sublayer: nn.Module, axis: str) -> None:
        how = cut_of(axis, getattr(self.config, axis))
        if not how:
            wrap(sublayer, "forward", self._whole)
            return
        summed = False
        for owner in list(sublayer.modules()):
            stacks = [(name, p, cut) for name, p in own_parameters(owner) if (cut := _of_stack(name, how))]
            self._place(owner, **{name: Shard(p.ndim - (2 if cut == "rows" else 1)) for name, p, cut in stacks})
            for name, linear in owner.named_children():
                summed |= self._cut_matrix(linear, how.get(name), owner is sublayer)
            for name in how.keys() & vars(owner).keys():
                setattr(owner, name, getattr(owner, name) / self.lanes.size)
        wrap(sublayer, "forward", self._entered if summed else self._entered_and_left)

    def _whole(self, forward: Forward, x_BPD: Tensor, **given: Any) -> Tensor:
        """Every rank computes all positions, and keeps its own."""
        if "context" in given:
            given["context"] = self._seen(given["context"])
        with self._random_numbers(own=False):
            return self.lanes.mine(forward(self.lanes.enter(x_BPD, self._length), **given))

    def _entered(self, forward: Forward, x_BPD: Tensor, **given: Any) -> Any:
        """All positions, for a sublayer whose last matrix sums over the ranks."""
        if "context" in given:
            given["context"] = self._seen(_of_heads(given["context"], self.config.n_heads, self.lanes))
        return forward(self.lanes.enter(x_BPD, self._length), **given)

    def _entered_and_left(self, forward: Forward, x_BPD: Tensor, **given: Any) -> Any:
        """The same for a sublayer whose output is a part of a sum, as of several experts."""
        return self.lanes.leave(self._entered(forward, x_BPD, **given))

    def _seen(self, context: AnyContext) -> AnyContext:
        """The encoder's output is whole on all ranks; its gradients are summed."""
        if isinstance(context, CrossContext) and context.output_BSD is not None:
            return dc.replace(context, output_BSD=self.lanes.spread(context.output_BSD))
        return context

    def _cut_matrix(self, linear: Any, how: How | None, is_last: bool) -> bool:
        """is_last: its outputs are the sublayer's. Returns whether they are summed here, before the bias is added."""
        if how == "shared_rows" and (heads := shared_heads(self.config)) % self.lanes.size:
            n, head = linear.out_features // heads, self.lanes.rank * heads // self.lanes.size
            self._place(linear, weight=Replicate(), bias=Replicate())
            linear.__dict__[ROWS] = slice(head * n, (head + 1) * n)
        elif how in ("rows", "shared_rows"):
            self._place(linear, weight=Shard(0), bias=Shard(0))
        elif how == "columns":
            assert is_last or linear.bias is None  # each rank would add it
            self._place(linear, weight=Shard(1), bias=Replicate())
            if is_last:
                wrap(linear, "forward", self._reduced, linear)
        if how is not None and isinstance(linear, AdaptedLinear):
            self._cut_factors(linear, how)
        return how == "columns" and is_last

    def _cut_factors(self, linear: AdaptedLinear, how: How) -> None:
        """B is cut as a matrix's outputs are, A as its inputs. Each rank drops other values of the adapter's input."""
        if how == "columns":
            self._place(linear.lora_A, weight=Shard(1))
        elif (rows := linear.__dict__.get(ROWS)) is not None:
            self._place(linear.lora_B, weight=Replicate())
            linear.lora_B.__dict__[ROWS] = rows
        else:
            self._place(linear.lora_B, weight=Shard(0))

    def _reduced(self, linear: nn.Linear, forward: Forward, x: Tensor) -> Tensor:
        y = self.lanes.leave(product(linear, x))
        return y if linear.bias is None else y + linear.bias.to(y.dtype)

    def _place(self, owner: nn.Module, **placements: Placement) -> None:
        place(owner, self.lanes.mesh, **placements)

    def rest(self) -> None:
        """Replicate the parameters that no rule has cut, and list those that are replicated."""
        within = {id(p) for m in self.model.modules() if isinstance(m, Block) for p in m.modules()}
        for module in self.model.modules():
            uncut = [name for name, p in own_parameters(module) if not isinstance(p, DTensor)]
            self._place(module, **dict.fromkeys(uncut, Replicate()))
            # Outside the blocks ranks have equal gradients; summing shares of them keeps copies equal to the bit.
            share = 1.0 if id(module) in within else 1.0 / self.lanes.size
            own = own_parameters(module)
            self.replicated += [(module, name, share) for name, p in own if p.placements[0].is_replicate()]

    def sum_gradients(self) -> None:
        """Sum the gradients of replicated parameters, in buckets, after a step's last backward."""
        held = [(owner._parameters[name], share) for owner, name, share in self.replicated]
        if self._buckets is None:
            self._buckets = GradientBuckets([p for p, _ in held if p is not None], self.lanes.group)
        for parameter, share in held:
            if share != 1.0 and parameter is not None and parameter.grad is not None:
                local(parameter.grad).mul_(share)
        self._buckets.finish()

    def clip(self, max_norm: float | None, shards: dist.ProcessGroup | None) -> Tensor:
        """As `OneProcess.clip`: parts count on their rank, whole gradients once. shards: ranks that shard the parts."""
        whole, share = {id(owner._parameters[name]) for owner, name, _ in self.replicated}, 1.0 / self.lanes.size
        own = self.model.parameters()
        held = [(local(p.grad), share if id(p) in whole else 1.0) for p in own if p.grad is not None]
        return clip(held, max_norm, self.lanes.group, shards)


def _of_stack(name: str, how: CutRules) -> How | None:
    """How a parameter of stacked experts is cut; of an adapter's factors one is cut as its matrix, the other whole."""
    factor = factor_of(name)
    if factor is None:
        return how.get(name)
    cut = how.get(factor.matrix)
    return cut if (cut, factor.kind) in (("columns", "A"), ("rows", "B")) else None


def _of_heads(context: AnyContext, n_heads: int, lanes: Lanes) -> AnyContext:
    """The context with the biases of this rank's heads."""
    mine = n_heads // lanes.size

    def narrowed(x: Tensor | None) -> Tensor | None:
        return x.narrow(1, lanes.rank * mine, mine) if x is not None and x.shape[1] == n_heads else x

    mask = context.mask
    return dc.replace(context, mask=dc.replace(mask, bias=narrowed(mask.bias), additive=narrowed(mask.additive)))

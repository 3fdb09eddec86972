"""Statistics of each layer, on demand: gradient and weight norms, size of its output, how evenly experts are visited.

Sums over all shards, each counted once, whatever the strategy. At a step without statistics nothing is done.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from txtrain.model.block import Block
from txtrain.model.ffn import balancing
from txtrain.model.ffn.moe import MixtureOfExperts
from txtrain.parallel.one_process import OneProcess
from txtrain.run_config import LayerStatsConfig

_BLOCK = re.compile(r".*?\bblocks?(\.\d+)?(?=\.)")  # blocks.3, encoder.blocks.0, mtp.0.block


class LayerStats:
    """
    Args:
        model: wrapped by the strategy.
    """

    def __init__(self, config: LayerStatsConfig, model: nn.Module, parallel: OneProcess) -> None:
        self.config, self.model, self.parallel = config, model, parallel
        self._outputs: dict[str, Tensor] = {}  # by block: sum of squares and number of its outputs on this rank

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that this adds to metrics.csv."""
        if self.config.every_n_steps is None:
            return ()
        layers = dict.fromkeys(layer_of(name) for name, p in self.model.named_parameters() if p.requires_grad)
        norms = [f"{what}/{layer}" for what in ("grad_norm", "weight_norm") for layer in layers]
        outputs = [f"activation_rms/{name}" for name, _ in self._blocks()] if self.config.activations else []
        loads = [
            f"{balancing.MAX_LOAD}/{name.rpartition('.')[0]}" for name, m in self.model.named_modules()
            if isinstance(m, MixtureOfExperts)
        ]
        return (*norms, *outputs, *loads)

    def due(self, step: int) -> bool:
        every = self.config.every_n_steps
        return every is not None and step % every == 0

    def _blocks(self) -> Iterator[tuple[str, nn.Module]]:
        return ((name, module) for name, module in self.model.named_modules() if isinstance(module, Block))

    @contextlib.contextmanager
    def watch(self, step: int) -> Iterator[None]:
        """Around the micro-batches of a step. The hooks are outside a block's forward: it is not recompiled, and not
        counted twice where its activations are recomputed."""
        if not (self.config.activations and self.due(step)):
            yield
            return
        self._outputs = {}
        hooks = [block.register_forward_hook(self._seen(name)) for name, block in self._blocks()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _seen(self, name: str) -> Any:
        def hook(block: nn.Module, given: Any, output: Tensor) -> None:
            seen = output.detach().double()
            sums = torch.stack([seen.square().sum(), seen.new_tensor(seen.numel())])
            self._outputs[name] = self._outputs[name] + sums if name in self._outputs else sums

        return hook

    def measure(self, step: int, visits: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Before gradient clipping. visits: how often each expert of a layer was chosen. Collective."""
        if not self.due(step):
            return {}
        found = self._norms()
        found |= {
            f"activation_rms/{name}": (square / n).sqrt()
            for name, (square, n) in self.parallel.reduce(self._outputs).items()
        }
        return found | {
            f"{balancing.MAX_LOAD}/{layer}": counts_E.max() / counts_E.mean() for layer, counts_E in visits.items()
        }

    @torch.no_grad()
    def _norms(self) -> dict[str, Tensor]:
        held = [(layer_of(name), p) for name, p in self.model.named_parameters() if p.requires_grad]
        groups: dict[str, list[Any]] = {
            f"grad_norm/{layer}": [p.grad for of, p in held if of == layer and p.grad is not None] for layer, _ in held
        }
        groups |= {f"weight_norm/{layer}": [p for of, p in held if of == layer] for layer, _ in held}
        device = held[0][1].device
        sums = torch.stack([_squares(tensors, self.parallel.world.size, device) for tensors in groups.values()])
        if self.parallel.world.size > 1:
            torch.distributed.all_reduce(sums)
        return dict(zip(groups, sums.sqrt().unbind(), strict=True))


def _squares(tensors: list[Any], n_processes: int, device: torch.device) -> Tensor:
    """This rank's share of the sum of squares over all ranks: of a replicated shard each replica counts its part."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for tensor in tensors:
        part, parts = tensor, 1
        if isinstance(tensor, DTensor):
            part = tensor.to_local()
            parts = math.prod(
                tensor.device_mesh.size(i)
                for i, placement in enumerate(tensor.placements) if not placement.is_replicate()
            )
        total += part.double().square().sum().to(device) * (parts / n_processes)
    return total


def layer_of(parameter: str) -> str:
    """A parameter's block, or its part of the model outside blocks: `blocks.3`, `embedding`, `encoder.final_norm`."""
    if found := _BLOCK.match(parameter):
        return found[0]
    *outer, _ = parameter.split(".")
    return ".".join(outer[:2] if outer[:1] in (["encoder"], ["mtp"]) else outer[:1])

"""Initialisation: each paper's rule; the values do not depend on the order of building or the number of devices.

One draw from torch's generator seeds the model; each parameter has its own generator, seeded by that draw and its name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from txtrain.errors import ConfigError
from txtrain.model.adapter import factor_of
from txtrain.model.ffn.moe import Experts
from txtrain.model.head.heads import ClassHead, LMHead
from txtrain.model.lora import Factor, fill_factor
from txtrain.model.shape import InitConfig


def init_weights(model: nn.Module, loaded: Container[str] = ()) -> None:
    """Fill a materialised model (`to_empty`) in place by `model.config.init`.

    loaded: names of tensors that are filled elsewhere; a module that owns no others is skipped.

    Raises:
        ConfigError: a module owns parameters or buffers, is no Linear or Embedding, and has no `reset_parameters()`.
    """
    if unset := to_initialise(model, loaded):
        initialiser = Initialiser(model)
        with torch.no_grad():
            for name, module in unset.items():
                initialiser.fill(name, module)


def to_initialise(model: nn.Module, loaded: Container[str]) -> dict[str, Any]:
    """The modules that own a tensor which is not loaded, by name."""

    def own(name: str, module: nn.Module) -> Iterator[str]:
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield f"{name}.{key}" if name else key

    return {n: module for n, module in model.named_modules() if any(name not in loaded for name in own(n, module))}


class Initialiser:
    """The rule of one model; modules may be filled in any order, and need not exist at the same time."""

    def __init__(self, model: nn.Module) -> None:
        config: Any = model.config
        self.seed = int(torch.randint(0, 2**62, ()).item())
        self.init: InitConfig = config.init
        named = [(m, getattr(m, "residual_projections", ())) for m in model.modules()]
        self._residual = {getattr(module, child) for module, children in named for child in children}
        self._classifier: Any = next((m.classifier for m in model.modules() if isinstance(m, ClassHead)), None)
        self._gains = _query_gains(model) if config.init.distribution == "fan_in" else {}
        self._residual_factor = (2 * config.n_layers) ** -0.5 if config.init.scale_residual else 1.0

    def fill(self, name: str, module: Any) -> None:
        """Fill the module's own parameters, not its children's. name: the module's in the model."""
        init = self.init
        if module is self._classifier:
            _output(module.weight, init, self._generator(module.weight, name))
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            factor = (self._residual_factor if module in self._residual else 1.0) * self._gains.get(module, 1.0)
            _matrix(module.weight, init, factor, self._generator(module.weight, name))
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.Embedding):
            std = init.position_std if "position" in name.split(".") else init.embedding_std
            _normal(module.weight, init, init.std if std is None else std, self._generator(module.weight, name))
        elif isinstance(module, LMHead):
            module.reset_parameters()
            if module.weight is not None:
                _output(module.weight, init, self._generator(module.weight, name))
        elif isinstance(module, Factor):
            fill_factor(module.weight, f"{name}.weight", self._generator(module.weight, name))
        elif isinstance(module, Experts):
            for child in module.stacked_projections:
                self.fill_stacked(name, module, child, getattr(module, child))
        elif [*module.parameters(recurse=False), *module.buffers(recurse=False)]:  # norms, and a user's own modules
            if not hasattr(module, "reset_parameters"):
                what = f"`{name}` ({type(module).__name__}) owns parameters or buffers"
                raise ConfigError(f"{what}: it must have a method reset_parameters() that fills them.")
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self._seed_of(name))
                module.reset_parameters()

    def fill_stacked(self, name: str, module: Experts, child: str, matrices: Iterable[Tensor]) -> None:
        """Fill the stacked matrices of one parameter, each as it would be alone; an iterator may make them lazily."""
        factor = self._residual_factor if child in module.residual_projections else 1.0
        generator = None
        for matrix in matrices:
            generator = generator or self._generator(matrix, f"{name}.{child}")
            if factor_of(child):
                fill_factor(matrix, child, generator)
            else:
                _matrix(matrix, self.init, factor, generator)

    def _generator(self, like: Tensor, name: str) -> torch.Generator:
        return torch.Generator(like.device).manual_seed(self._seed_of(name))

    def _seed_of(self, name: str) -> int:
        digest = hashlib.blake2b(f"{self.seed}:{name}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1


def _query_gains(model: nn.Module) -> dict[nn.Module, float]:
    """Scores start with deviation 1 whatever attention.scale is: with T5's scale of 1, queries start smaller."""
    names = ("q_proj", "scale", "head_dim")
    scaled: list[Any] = [m for m in model.modules() if all(hasattr(m, name) for name in names)]
    return {m.q_proj: m.head_dim**-0.5 / m.scale for m in scaled}


def _matrix(weight: Tensor, init: InitConfig, factor: float, generator: torch.Generator) -> None:
    if init.distribution == "xavier_uniform":
        nn.init.xavier_uniform_(weight, gain=factor, generator=generator)
    elif init.distribution == "fan_in":
        _normal(weight, init, init.std * factor * weight[0].numel() ** -0.5, generator)
    else:
        _normal(weight, init, init.std * factor, generator)


def _output(weight: Tensor, init: InitConfig, generator: torch.Generator) -> None:
    """An untied output matrix."""
    if init.head_std is None:
        _matrix(weight, init, 1.0, generator)
    else:
        _normal(weight, init, init.head_std, generator)


def _normal(weight: Tensor, init: InitConfig, std: float, generator: torch.Generator) -> None:
    if init.distribution == "truncated_normal":
        nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)
    else:
        nn.init.normal_(weight, std=std, generator=generator)

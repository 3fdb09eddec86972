"""How weights start: each paper's rule, the same numbers whatever is built, in which order, and on how many devices.

One draw from torch's generator seeds the model; each parameter then has a generator of its own, seeded by that draw and by its name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from txtrain.errors import ConfigError
from txtrain.model.ffn.moe import Experts
from txtrain.model.head.heads import ClassHead, LMHead
from txtrain.model.shape import InitConfig


def init_weights(model: nn.Module, loaded: Container[str] = ()) -> None:
    """Fill a materialised model (`to_empty`) in place by `model.config.init`.

    loaded: names of what is given its values elsewhere; a module that owns nothing else is left as it is.

    Raises:
        ConfigError: a module owns parameters or buffers, is no Linear or Embedding, and has no `reset_parameters()`.
    """
    initialiser = Initialiser(model)
    with torch.no_grad():
        for name, module in to_initialise(model, loaded):
            initialiser.fill(name, module)


def to_initialise(model: nn.Module, loaded: Container[str]) -> Iterator[tuple[str, Any]]:
    """Modules that own nothing, or something that is not loaded, with their names."""
    for name, module in model.named_modules():
        own = [key for key, tensor in (*module._parameters.items(), *module._buffers.items()) if tensor is not None]
        if not own or any((f"{name}.{key}" if name else key) not in loaded for key in own):
            yield name, module


class Initialiser:
    """The rule of one model, module by module: in which order they are filled, and how many of them exist at a time, changes no value."""

    def __init__(self, model: nn.Module) -> None:
        config: Any = model.config
        self.seed = int(torch.randint(0, 2**62, ()).item())
        self.init: InitConfig = config.init
        self._residual = _residual_projections(model)
        self._classifier: Any = next((m.classifier for m in model.modules() if isinstance(m, ClassHead)), None)
        self._gains = _query_gains(model) if config.init.distribution == "fan_in" else {}
        self._residual_factor = (2 * config.n_layers) ** -0.5 if config.init.scale_residual else 1.0

    def fill(self, name: str, module: Any) -> None:
        """Fill what the module itself owns, its children aside. name: its own in the model."""
        init = self.init
        if module is self._classifier:
            _output(module.weight, init, self._generator(module.weight, name))
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
        elif isinstance(module, Experts):
            for child in module.stacked_projections:
                self.fill_stacked(name, module, child, getattr(module, child))
        elif any(True for _ in module.parameters(recurse=False)) or any(True for _ in module.buffers(recurse=False)):
            _reset(name, module, self.seed)

    def fill_stacked(self, name: str, module: Experts, child: str, matrices: Iterable[Tensor]) -> None:
        """Fill matrices that lie side by side in one parameter, each as it would be alone; they may be made one by one."""
        factor = self._residual_factor if child in module.residual_projections else 1.0
        generator = None
        for matrix in matrices:
            generator = generator or self._generator(matrix, f"{name}.{child}")
            _matrix(matrix, self.init, factor, generator)

    def _generator(self, like: Tensor, name: str) -> torch.Generator:
        digest = hashlib.blake2b(f"{self.seed}:{name}".encode(), digest_size=8).digest()
        return torch.Generator(like.device).manual_seed(int.from_bytes(digest, "little") >> 1)


def _residual_projections(model: nn.Module) -> set[Any]:
    """The modules that write into the residual stream, as their owners name them."""
    return {getattr(m, child) for m in model.modules() for child in getattr(m, "residual_projections", ())}


def _query_gains(model: nn.Module) -> dict[nn.Module, float]:
    """Scores start with deviation 1 whatever attention.scale is: T5, whose scale is 1, starts its queries smaller instead."""
    scaled: list[Any] = [m for m in model.modules() if hasattr(m, "q_proj") and hasattr(m, "scale") and hasattr(m, "head_dim")]
    return {m.q_proj: m.head_dim**-0.5 / m.scale for m in scaled}


def _matrix(weight: Tensor, init: InitConfig, factor: float, generator: torch.Generator) -> None:
    if init.distribution == "xavier_uniform":
        nn.init.xavier_uniform_(weight, gain=factor, generator=generator)
    elif init.distribution == "fan_in":
        _normal(weight, init, init.std * factor * weight[0].numel() ** -0.5, generator)
    else:
        _normal(weight, init, init.std * factor, generator)


def _output(weight: Tensor, init: InitConfig, generator: torch.Generator) -> None:
    """An output matrix of its own."""
    if init.head_std is None:
        _matrix(weight, init, 1.0, generator)
    else:
        _normal(weight, init, init.head_std, generator)


def _normal(weight: Tensor, init: InitConfig, std: float, generator: torch.Generator) -> None:
    if init.distribution == "truncated_normal":
        nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)
    else:
        nn.init.normal_(weight, std=std, generator=generator)


def _reset(name: str, module: nn.Module, seed: int) -> None:
    """Norms, and a user's own modules: torch's convention, under a seed of their own."""
    reset = getattr(module, "reset_parameters", None)
    if reset is None:
        kind = type(module).__name__
        raise ConfigError(
            f"`{name}` ({kind}) owns parameters or buffers: it must have a method reset_parameters() that fills them."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest(), "little") >> 1)
        reset()

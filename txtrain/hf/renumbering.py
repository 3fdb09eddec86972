"""Sinusoids by halves: the same model with the dimensions of its residual stream in another order.

Marian's sines come before its cosines; here they alternate. Nothing else in a model of dense parts with layer norms
depends on the order, so that permuted weights give the same logits. No torch.
"""

from __future__ import annotations

import dataclasses as dc
import re

from txtrain.model.config import ModelConfig
from txtrain.model.position.config import SinusoidalConfig

# The dimension of a tensor that runs along the stream; vectors that are not named here do not.
_ALONG = (
    (r"(encoder_)?embedding\.token\.weight|head\.weight", 1), (r".*\.(q|k|v|up)_proj\.weight", 1),
    (r".*\.(o|down)_proj\.(weight|bias)", 0), (r".*(_residual\.norm|final_norm)\.(weight|bias)", 0),
)


def by_halves(model: ModelConfig) -> ModelConfig | None:
    """The configuration with its dimensions renumbered, or None if that is not this case."""
    plain = (model.attention.type, model.ffn.type, model.norm.type, model.embedding.type, model.head.type)
    if not isinstance(model.position, SinusoidalConfig) or model.position.layout == "halves":
        return None
    if plain != ("mha", "mlp", "layer", "token", "lm") or model.embedding.n_types or model.attention.qk_norm:
        return None
    return dc.replace(model, position=dc.replace(model.position, layout="halves"))


def order(dim: int) -> list[int]:
    """For each dimension by halves, its index here."""
    return [*range(0, dim, 2), *range(1, dim, 2)]


def along(name: str) -> int | None:
    """The dimension of our tensor that is to be renumbered, or None."""
    return next((at for pattern, at in _ALONG if re.fullmatch(pattern, name)), None)

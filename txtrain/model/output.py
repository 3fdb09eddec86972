"""What a model returns, with the interface that Hugging Face's trainers and collators expect."""

from __future__ import annotations

import dataclasses as dc
from typing import Any

from torch import Tensor
from torch.utils import _pytree

from txtrain.model.attention.cache import Cache

_NOT_IN_TUPLE = (
    "mtp_logits", "mtp_losses", "lm_loss", "log_probs", "last_hidden_state", "encoder_last_hidden_state", "aux",
    "loss_scale",
)


@dc.dataclass
class ModelOutput:
    """Fields that do not apply are None. `output[0]` and `output["loss"]` work as in Hugging Face: None is left out."""

    loss: Tensor | None = None
    logits: Tensor | None = None  # [B, T, V], or [B, classes]
    nsp_logits: Tensor | None = None  # [B, 2]
    mtp_logits: tuple[Tensor, ...] | None = None  # [B, T - k, V] for each MTP depth k = 1, 2, ...
    mtp_losses: tuple[Tensor, ...] | None = None  # not part of `loss`
    lm_loss: Tensor | None = None  # of the next tokens beside a class; not part of `loss`
    log_probs: Tensor | None = None  # [B, T], of the labels
    past_key_values: Cache | None = None
    last_hidden_state: Tensor | None = None  # [B, T, D]
    encoder_last_hidden_state: Tensor | None = None  # [B, S, D]
    aux: dict[str, Tensor] | None = None  # statistics of the blocks
    loss_scale: Tensor | None = None  # of the experts' auxiliary losses, 1 until a backward through `loss` begins

    def to_tuple(self) -> tuple[Any, ...]:
        """As a causal model of Hugging Face: transformers.Trainer takes all after the loss for predictions."""
        return tuple(value for name, value in self.items() if name not in _NOT_IN_TUPLE)

    def items(self) -> list[tuple[str, Any]]:
        return [(f.name, value) for f in dc.fields(self) if (value := getattr(self, f.name)) is not None]

    def keys(self) -> list[str]:
        return list(dict(self.items()))

    def __getitem__(self, key: int | slice | str) -> Any:
        return dict(self.items())[key] if isinstance(key, str) else self.to_tuple()[key]

    def __contains__(self, key: str) -> bool:
        return key in self.keys()


# FSDP and DDP hook the tensors that pytree finds in outputs; to pytree an unknown class is a leaf without tensors.
_pytree.register_dataclass(ModelOutput)

"""Tensors from our layout to theirs and back, by the tables of name_map.py."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from txtrain.hf.name_map import Stored
from txtrain.model.transformer import Transformer


def tensors_of(model: Transformer) -> dict[str, Tensor]:
    """Parameters and persistent buffers that a class of transformers has: all but multi-token prediction's."""
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("mtp.")}


def to_theirs(stored: Stored, ours: Mapping[str, Tensor]) -> Tensor:
    """One tensor of theirs."""
    parts = [ours[name].detach() for name in stored.parts]
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    if stored.expert is not None:
        whole = whole[stored.expert]
    if stored.order is not None:
        whole = whole[stored.order]
    if stored.leading:
        whole = whole[None]
    return whole.T if stored.transposed else whole


def from_theirs(stored: Stored, tensor: Tensor, ours: Mapping[str, Tensor]) -> None:
    """Fill ours, in place, from one tensor of theirs."""
    parts = [ours[name] if stored.expert is None else ours[name][stored.expert] for name in stored.parts]
    whole = tensor[0] if stored.leading else tensor.T if stored.transposed else tensor
    if stored.order is not None:
        whole = torch.empty_like(whole).index_copy_(0, torch.tensor(stored.order, device=whole.device), whole)
    for part, piece in zip(parts, torch.split(whole, [p.shape[0] for p in parts]), strict=True):
        part.copy_(piece)

"""Contents of a micro-batch, from the objective: for the tape, as tensors, in bytes."""

from __future__ import annotations

import math
from typing import Any

from txtrain.config.schema import Train
from txtrain.data.sources.source import method_of
from txtrain.model.trace.attention_ops import Batch
from txtrain.objectives.base_config import Shapes
from txtrain.registry import chosen, is_own, resolve

_FLOATS = ("pixel_values", "reference_log_probs", "teacher_log_probs")  # of float32, the others of int64


def unknown(config: Train) -> list[str]:
    """Sentences on a user's own options that leave the contents of a batch unknown."""
    objective, data, found = config.objective, config.data, []
    if is_own("objective", objective):
        found.append(f"{chosen('objective', objective)} is your own: its batches and its loss are unknown")
    known = ("documents", "pairs", "labelled", "images")  # methods of a source whose samples are known
    if is_own("data", data) and method_of(resolve("data", data.type)) not in known:
        found.append(f"{chosen('data', data)} is your own: the contents of its samples are unknown")
    return found


def batch_of(config: Train, n: int) -> Batch:
    """n samples, for the model's trace."""
    shapes = config.objective.batch_shapes(config, n)
    source = shapes["input_ids"][1] if "input_ids" in shapes else config.lengths[0]
    names = {"documents_BS": "document_ids", "valid_BS": "attention_mask", "prefix_BS": "prefix_mask"}
    masked = {ours: True for ours, name in names.items() if name in shapes}
    return Batch(
        n,
        source,
        _target(config, shapes, source),
        masked,
        {**({"documents_BS": True} if "decoder_document_ids" in shapes else {}), **_padded_target(config, shapes)},
        n_chosen(config, n) if config.model.head.skips else None,
        config.objective.smoothed,
        "token_type_ids" in shapes and bool(config.model.embedding.n_types),
    )


def _target(config: Train, shapes: Shapes, source: int) -> int | None:
    """Positions of a decoder beside an encoder; for a class it reads the source again."""
    if config.model.topology != "encoder_decoder":
        return None
    return source if config.objective.one_result else shapes["labels"][1]


def _padded_target(config: Train, shapes: Shapes) -> dict[str, bool]:
    """A model that counts tokens masks the padding of the targets (`Transformer.forward`)."""
    pads = config.model.counts_tokens and "attention_mask" in shapes
    return {"valid_BS": True} if pads else {}


def tensors_of(config: Train, n: int) -> dict[str, Any]:
    """The same as tensors of zeros; as many labels are targets as the objective chooses."""
    import torch

    kinds = dict.fromkeys(_FLOATS, torch.float32)
    if config.objective.one_result and config.model.head.kind != "single":
        kinds["labels"] = torch.float32
    shapes = config.objective.batch_shapes(config, n)
    made = {name: torch.zeros(shape, dtype=kinds.get(name, torch.int64)) for name, shape in shapes.items()}
    chosen = n_chosen(config, 1)
    if chosen is not None:
        made["labels"][:, chosen:] = -100
    return made


def nbytes_of(config: Train, n: int) -> int:
    """Bytes of n samples."""
    shapes = config.objective.batch_shapes(config, n)
    return sum((4 if name in _FLOATS else 8) * math.prod(shape) for name, shape in shapes.items())


def n_chosen(config: Train, n: int) -> int | None:
    """Expected number of positions of n samples that the objective chooses as targets; None: all are."""
    share = config.objective.target_share
    return None if share == 1.0 else round(share * n * config.lengths[0])

"""What one process' micro-batch holds, by objective: names and sizes, as the data give them."""

from __future__ import annotations

from typing import Any

from txtrain.config.schema import Train
from txtrain.model.trace.attention_ops import Batch
from txtrain.registry import chosen, is_own, resolve

Shapes = dict[str, tuple[int, ...]]


def unknown(config: Train) -> list[str]:
    """What is not known of a batch, and so of the work on it: sentences about options of the user's own."""
    objective, data, found = config.objective, config.data, []
    if is_own("objective", objective):
        found.append(f"{chosen('objective', objective)} is your own: of its batches and its loss nothing is known")
    known = ("documents", "pairs", "images")  # methods of a source that say what its samples are
    if is_own("data", data) and not any(hasattr(resolve("data", data.type), method) for method in known):
        found.append(f"{chosen('data', data)} is your own: of what its samples hold nothing is known")
    return found


def shapes_of(config: Train, n: int) -> Shapes:
    """Integers [n, ...] (pixels: floats), by the names under which the objective reads them."""
    source, target = config.lengths
    seq: Shapes = {"input_ids": (n, source)}
    objective = config.objective.type
    if objective == "image_classification":
        e = config.model.embedding
        return {"pixel_values": (n, e.n_channels, e.image_size, e.image_size), "labels": (n,)}
    if objective == "seq2seq":
        return seq | {"attention_mask": (n, source), "labels": (n, target or source)}
    if objective == "masked_lm" and config.objective.pairs(config.model.head):
        return seq | {"token_type_ids": (n, source), "attention_mask": (n, source), "labels": (n, source), "next_sentence_label": (n,)}
    documents = not config.data.cross_document_attention
    if target is not None:
        if objective == "prefix_lm":
            source = target = source - 1
            seq = {"input_ids": (n, source), "attention_mask": (n, source)}
        of_documents: Shapes = {"document_ids": (n, source), "decoder_document_ids": (n, target)}
        return seq | {"labels": (n, target)} | (of_documents if documents else {})
    prefix: Shapes = {"prefix_mask": (n, source)} if objective == "prefix_lm" else {}
    return seq | {"labels": (n, source)} | ({"document_ids": (n, source)} if documents else {}) | prefix


def batch_of(config: Train, n: int) -> Batch:
    """The same, as the model's trace reads it."""
    shapes = shapes_of(config, n)
    source = shapes["input_ids"][1] if "input_ids" in shapes else config.lengths[0]
    two = config.model.topology == "encoder_decoder"
    names = {"documents_BS": "document_ids", "valid_BS": "attention_mask", "prefix_BS": "prefix_mask"}
    masked = {ours: True for ours, name in names.items() if name in shapes}
    return Batch(
        n,
        source,
        shapes["labels"][1] if two else None,
        masked,
        {"documents_BS": True} if "decoder_document_ids" in shapes else {},
        n_chosen(config, n) if config.model.head.skips else None,
        bool(config.objective.label_smoothing),
        "token_type_ids" in shapes and bool(config.model.embedding.n_types),
    )


def tensors_of(config: Train, n: int) -> dict[str, Any]:
    """The same as tensors, of zeros; of labels only as many are targets as an objective chooses."""
    import torch

    made = {name: torch.zeros(size, dtype=torch.float32 if name == "pixel_values" else torch.int64) for name, size in shapes_of(config, n).items()}
    chosen = n_chosen(config, 1)
    if chosen is not None:
        made["labels"][:, chosen:] = -100
    return made


def nbytes_of(config: Train, n: int) -> int:
    """Bytes of the whole batch."""
    total = 0
    for name, shape in shapes_of(config, n).items():
        size = 4 if name == "pixel_values" else 8
        for length in shape:
            size *= length
        total += size
    return total


def n_chosen(config: Train, n: int) -> int | None:
    """Positions of n samples that a masked language model predicts, as is to be expected; None: the objective chooses none."""
    share = config.objective.target_share
    return None if share == 1.0 else round(share * n * config.lengths[0])

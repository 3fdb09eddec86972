"""The cost of a pass through a model in closed form: FLOPs of matrix products, and the size of a cache. No torch.

Two conventions, which differ only in what a mask hides:

    dense      every query meets every key, as in the plain formula. `ModelConfig.forward_flops` counts so, and equals
               torch.utils.flop_counter.FlopCounterMode over that formula to the last operation.
    useful     a window counts as its width, since kernels skip what it hides; a causal mask counts in full, as usual
               (PaLM, 2204.02311, appendix B). `ModelConfig.flops_per_token` and the MFU count so.

Elementwise work (norms, activations, softmax, rotations) is not counted. A mixture of experts counts the experts that a
token visits; latent attention its expanded form, which training uses.
"""

from __future__ import annotations

from collections.abc import Mapping

from txtrain.model.shape import ModelShape


def forward_by_part(
    model: ModelShape, seq_len: int, target_len: int | None = None, *, dense: bool, training: bool = False,
    target_share: float = 1.0,
) -> dict[str, float]:
    """Forward FLOPs of one sample, by part, with the logits of every position that the head does not skip.

    Args:
        seq_len: positions of the sequence; with two stacks of the source; of an image its patches and class token.
        target_len: positions of the target with two stacks; None: seq_len.
        training: with multi-token prediction, which decoding omits.
        target_share: share of the positions with a target; only a head that skips the others costs less (BERT's).
    """
    length, blocks = _blocks(model, seq_len, target_len, dense)
    parts = {
        "embedding": seq_len * model.embedding.flops(model, seq_len),
        "attention": sum(attention for attention, _, _ in blocks),
        "cross_attention": sum(cross for _, cross, _ in blocks),
        "ffn": sum(ffn for _, _, ffn in blocks),
        "head": length * model.head.training_flops(model, length, target_share),
        "mtp": sum(_mtp(model, length, depth, dense) for depth in range(1, model.mtp_depth + 1)) if training else 0.0,
    }
    return {name: flops for name, flops in parts.items() if flops}


def training_flops(forward: Mapping[str, float]) -> float:
    """Forward and backward, the backward twice the forward, without recomputation; pixels need no gradient."""
    return 3.0 * sum(forward.values()) - forward.get("embedding", 0.0)


def recomputed_flops(
    model: ModelShape, seq_len: int, target_len: int | None = None, *, checkpointing: str | int, dense: bool = False
) -> float:
    """FLOPs that activation checkpointing computes again for one sample: the forward of every block, or every n-th.

    checkpointing: none, full, selective (which keeps the results of matrix products), or n.
    """
    if checkpointing in ("none", "selective"):
        return 0.0
    length, parts = _blocks(model, seq_len, target_len, dense)
    blocks = [attention + ffn + cross for attention, cross, ffn in parts]
    for depth in range(1, model.mtp_depth + 1):
        blocks.append(sum(_block(model, max(length - depth, 0), model.n_layers + depth - 1, True, dense)))
    return sum(blocks[:: 1 if checkpointing == "full" else int(checkpointing)])


def _blocks(
    model: ModelShape, seq_len: int, target_len: int | None, dense: bool
) -> tuple[int, list[tuple[float, float, float]]]:
    """The length of the stack that ends in the head, and `_block` of each of its blocks, then of the encoder's."""
    crossed = model.topology == "encoder_decoder"
    length = (target_len or seq_len) if crossed else seq_len
    causal, source_len = model.topology != "encoder", seq_len if crossed else 0
    blocks = [_block(model, length, i, causal, dense, source_len) for i in range(model.n_layers)]
    return length, blocks + [_block(model, seq_len, i, False, dense) for i in range(model.encoder_layers)]


def _block(
    model: ModelShape, seq_len: int, layer: int, causal: bool, dense: bool, source_len: int = 0
) -> tuple[float, float, float]:
    """Self-attention, cross-attention (without a window) to source_len positions, and feed-forward."""
    if not seq_len:
        return 0.0, 0.0, 0.0
    of_query, of_key = model.attention.projection_flops(model, layer)
    of_score: float = model.attention.score_flops(model, layer)
    seen = seq_len if dense else model.attention.seen(seq_len, layer, causal=causal)
    cross = seq_len * of_query + source_len * of_key + of_score * seq_len * source_len if source_len else 0.0
    return seq_len * (of_query + of_key + of_score * seen), cross, seq_len * model.ffn.flops(model, seq_len, layer)


def _mtp(model: ModelShape, seq_len: int, depth: int, dense: bool) -> float:
    """One MTP module: projection, block and head over the rest of the sequence."""
    length = max(seq_len - depth, 0)
    block = _block(model, length, model.n_layers + depth - 1, True, dense)
    return length * (4.0 * model.dim**2 + model.head.flops(model, length)) + sum(block) if length else 0.0


def cache_values(model: ModelShape, seq_len: int, source_len: int = 0) -> int:
    """Numbers in one row's cache after seq_len tokens (at most window - 1) and source_len encoded tokens."""
    if model.topology == "encoder":
        return 0
    across, total = source_len if model.topology == "encoder_decoder" else 0, 0
    for layer in range(model.n_layers):
        window = model.attention.window_at(layer)
        held = seq_len if window is None else min(seq_len, window - 1)
        total += model.attention.cache_values(model, layer) * (held + across)
    return total


GROWTH = 256  # positions by which a cache's buffer grows, so that not every token copies all of it


def cache_values_per_token(model: ModelShape) -> int:
    """Numbers that one more token adds to a cache while no window is full."""
    layers = range(0 if model.topology == "encoder" else model.n_layers)
    return sum(model.attention.cache_values(model, i) for i in layers)

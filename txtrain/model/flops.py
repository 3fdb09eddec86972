"""What a pass through a model costs, in closed form: matrix products, and what a cache holds. No torch.

Two conventions, and the difference between them is only what a mask hides:

    dense      every query meets every key, as the plain formula computes it. `ModelConfig.forward_flops` counts so, and equals
               torch.utils.flop_counter.FlopCounterMode over that formula to the last operation.
    useful     a window counts as its width, since kernels that skip what it hides exist; a causal mask counts in full, as is the
               custom (PaLM, 2204.02311, appendix B). `ModelConfig.flops_per_token` and the MFU count so.

Elementwise work (norms, activations, softmax, rotations) is no matrix product and counts in neither. A mixture of experts counts the
experts that a token visits; latent attention its expanded form, in which it is trained.
"""

from __future__ import annotations

from collections.abc import Mapping

from txtrain.model.shape import ModelShape


def forward_by_part(
    model: ModelShape, seq_len: int, target_len: int | None = None, *, dense: bool, training: bool = False, target_share: float = 1.0
) -> dict[str, float]:
    """FLOPs of one sample's forward pass, by part; logits of every position that the head does not skip.

    Args:
        seq_len: positions of the sequence; of the source where there are two stacks. An image's: patches, and the class token.
        target_len: of the target, where there are two stacks; None: seq_len.
        training: with the modules that predict further tokens (`mtp`), which decoding does without.
        target_share: of the positions that have a target. Only a head that skips the others costs less for it (BERT's).
    """
    encoder_layers = range(model.encoder_layers)
    length = (target_len or seq_len) if encoder_layers else seq_len  # of the stack that ends in the head
    blocks = [_block(model, length, i, model.topology != "encoder", dense) for i in range(model.n_layers)]
    blocks += [_block(model, seq_len, i, False, dense) for i in encoder_layers]
    parts = {
        "embedding": seq_len * model.embedding.flops(model, seq_len),
        "attention": sum(attention for attention, _ in blocks),
        "cross_attention": sum(_cross_attention(model, length, seq_len, i) for i in range(model.n_layers)) if encoder_layers else 0.0,
        "ffn": sum(ffn for _, ffn in blocks),
        "head": length * model.head.training_flops(model, length, target_share),
        "mtp": sum(_further_token(model, length, depth, dense) for depth in range(1, model.mtp_depth + 1)) if training else 0.0,
    }
    return {name: flops for name, flops in parts.items() if flops}


def training_flops(forward: Mapping[str, float]) -> float:
    """Of forward and backward, the backward twice the forward, without recomputation; but pixels need no gradient."""
    return 3.0 * sum(forward.values()) - forward.get("embedding", 0.0)


def recomputed_flops(model: ModelShape, seq_len: int, target_len: int | None = None, *, checkpointing: str | int, dense: bool = False) -> float:
    """Of one sample, what activation checkpointing computes a second time: the forward of every block, or of every n-th.

    checkpointing: none, full, selective (which keeps what matrix products gave), or n.
    """
    if checkpointing in ("none", "selective"):
        return 0.0
    encoder_layers = range(model.encoder_layers)
    length = (target_len or seq_len) if encoder_layers else seq_len
    blocks = [sum(_block(model, length, i, model.topology != "encoder", dense)) for i in range(model.n_layers)]
    if encoder_layers:
        blocks = [block + _cross_attention(model, length, seq_len, i) for i, block in enumerate(blocks)]
    blocks += [sum(_block(model, seq_len, i, False, dense)) for i in encoder_layers]
    further = [(max(length - depth, 0), model.n_layers + depth - 1) for depth in range(1, model.mtp_depth + 1)]
    blocks += [sum(_block(model, rest, layer, True, dense)) if rest else 0.0 for rest, layer in further]
    return sum(blocks[:: 1 if checkpointing == "full" else int(checkpointing)])


def _block(model: ModelShape, seq_len: int, layer: int, causal: bool, dense: bool) -> tuple[float, float]:
    """Attention of a sequence to itself, and feed-forward."""
    of_query, of_key = model.attention.projection_flops(model, layer)
    seen = seq_len if dense else model.attention.seen(seq_len, layer, causal=causal)
    scores = model.attention.score_flops(model, layer) * seen
    return seq_len * (of_query + of_key + scores), seq_len * model.ffn.flops(model, seq_len, layer)


def _further_token(model: ModelShape, seq_len: int, depth: int, dense: bool) -> float:
    """A module for multi-token prediction: projection, block and head over what is left of the sequence."""
    length = max(seq_len - depth, 0)
    if not length:
        return 0.0
    block = _block(model, length, model.n_layers + depth - 1, True, dense)
    return length * (4.0 * model.dim**2 + model.head.flops(model, length)) + sum(block)


def _cross_attention(model: ModelShape, n_queries: int, n_keys: int, layer: int) -> float:
    """Of a target to a source, all of it: windows are of one sequence."""
    of_query, of_key = model.attention.projection_flops(model, layer)
    scores: float = model.attention.score_flops(model, layer) * n_queries * n_keys
    return n_queries * of_query + n_keys * of_key + scores


def cache_values(model: ModelShape, seq_len: int, source_len: int = 0) -> int:
    """Numbers that a cache holds of one row after seq_len tokens: of a windowed layer the last window - 1 of them.

    Args:
        source_len: what an encoder read, of which each layer of the decoder keeps its projections. 0 without an encoder.
    """
    if model.topology == "encoder":
        return 0  # it reads all at once
    total = 0
    for layer in range(model.n_layers):
        window = model.attention.window_at(layer)
        held = seq_len if window is None else min(seq_len, window - 1)
        across = source_len if model.topology == "encoder_decoder" else 0
        total += model.attention.cache_values(model, layer) * (held + across)
    return total


def cache_values_per_token(model: ModelShape) -> int:
    """Numbers that one more token adds to a cache as long as no window is full."""
    return 0 if model.topology == "encoder" else sum(model.attention.cache_values(model, i) for i in range(model.n_layers))

"""What travels to experts that are divided over processes, and back, in a step. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from txtrain.config.schema import Train


def rows_to_experts(config: Train, world: int) -> int:
    """Bytes that a process sends in all_to_all in a step, those to itself included: a token's vector for each expert that it visits.

    Exact for the mean over the processes, whatever the load: each process sends its own rows forward and receives their gradients, and
    what it sends for others is in the mean as much. Once to the experts and once back, forward and backward; a forward that is
    computed again sends again.
    """
    model, precision = config.model, config.trainer.precision
    share = config.data.global_batch_size / config.strategy.layout(world).data
    values = sum(_trips(config, number) * positions for number, positions in _mixtures(config)) * model.ffn.top_k * model.dim
    bytes_sent: int = round(share * values * (4 if precision == "32-true" else 2))
    return bytes_sent


def _trips(config: Train, block: int) -> int:
    again = config.trainer.activation_checkpointing
    return 4 if again == "none" or (isinstance(again, int) and block % again) else 6


def _mixtures(config: Train) -> Iterator[tuple[int, int]]:
    """Of each block with a mixture: its number among all blocks, as activation checkpointing counts them, and the positions of a sample in it."""
    model, (source, target) = config.model, config.lengths
    blocks = [(layer, target or source) for layer in range(model.n_layers)]
    blocks += [(layer, source) for layer in range(model.encoder_layers if target else 0)]
    blocks += [(model.n_layers + depth, (target or source) - 1 - depth) for depth in range(model.mtp_depth)]
    return ((number, positions) for number, (layer, positions) in enumerate(blocks) if layer >= model.ffn.dense_layers)

"""ModelConfig: one transformer, described. Dataclasses, legality and closed forms; no torch."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from txtrain.ground.convert import plain
from txtrain.model import flops, rules
from txtrain.model import options as options  # (registers the options of all axes)
from txtrain.model.shape import LAPTOP, ModelShape
from txtrain.registry import knob, out_of_range


class ModelConfig(ModelShape):
    """A model's shape with what is legal and what it costs.

    No dataclass of its own, so that names that are no fields can be set: transformers.Trainer marks a model's config.
    """

    # ---------------------------------------------------------------------------------------------------------- legality

    def check(self) -> Iterator[str]:
        """Problems as finished sentences; none if the model can be built."""
        problems = list(out_of_range(self, "model"))
        yield from problems
        if problems:
            return  # what follows computes with them
        if (depth := self.mtp_depth) >= (n := self.max_seq_len):
            yield f"`model.mtp_depth` must be below max_seq_len ({n}), but is {depth} instead. Nearest: {n - 1}."
        yield from rules.problems(self)
        for _, component in self.components():
            yield from component.check(self)

    # ------------------------------------------------------------------------------------------------------- closed forms

    def n_params_by_part(self) -> dict[str, int]:
        """Trainable parameters by part. A tied head owns no matrix; `mtp` is all that predicts further tokens than the next."""
        layers, encoder_layers = range(self.n_layers), range(self.encoder_layers)
        n_stacks = 2 if encoder_layers else 1
        n_sublayers = 2 * self.n_layers + 2 * len(encoder_layers) + (self.n_layers if encoder_layers else 0)
        attention = sum(self.attention.n_params(self, i) for i in (*layers, *encoder_layers))
        return {
            "embedding": self.embedding.n_params(self) * (1 if self.share_embeddings else n_stacks),
            "position": self.position.n_params(self) * n_stacks,
            "attention": attention,
            "cross_attention": sum(self.attention.n_params(self, i) for i in layers) if encoder_layers else 0,
            "ffn": sum(self.ffn.n_params(self, i) for i in (*layers, *encoder_layers)),
            "norms": n_sublayers * self.residual.n_params(self) + (self.norm.n_params(self) * n_stacks if self.has_final_norm else 0),
            "head": self.head.n_params(self),
            "mtp": sum(self._mtp_params(self.n_layers + i) for i in range(self.mtp_depth)),
        }

    def _mtp_params(self, layer: int) -> int:
        """Of one module: projection, two norms before it, a block as if it were that layer, a norm before the head."""
        block = self.attention.n_params(self, layer) + self.ffn.n_params(self, layer) + 2 * self.residual.n_params(self)
        return 2 * self.dim**2 + block + (3 if self.has_final_norm else 2) * int(self.norm.n_params(self))

    @property
    def n_params(self) -> int:
        return sum(self.n_params_by_part().values())

    @property
    def n_active_params(self) -> int:
        """Of these, what the logits of a token are made with: the experts that it visits, and no module for further tokens."""
        parts = self.n_params_by_part()
        layers = (*range(self.n_layers), *range(self.encoder_layers))
        active = sum(self.ffn.n_active_params(self, i) for i in layers)
        return sum(parts.values()) - parts["mtp"] - parts["ffn"] + active

    def forward_flops(self, batch_size: int, seq_len: int, target_len: int | None = None) -> int:
        """Floating-point operations of one forward pass with the logits of every position, as FlopCounterMode counts the plain formula.

        Those of further tokens (mtp_depth) count too, as the model gives them wherever it has no cache. seq_len: of the source where there
        are two stacks, target_len that of the target (None: the same).
        """
        return round(batch_size * sum(flops.forward_by_part(self, seq_len, target_len, dense=True, training=True).values()))

    def flops_per_sample(self, seq_len: int, target_len: int | None = None, target_share: float = 1.0) -> float:
        """As `flops_per_token`, of a whole sequence, pair or image. target_share: of the positions that have a target (`flops.forward_by_part`)."""
        return flops.training_flops(flops.forward_by_part(self, seq_len, target_len, dense=False, training=True, target_share=target_share))

    def recomputed_flops(self, seq_len: int, target_len: int | None = None, checkpointing: str | int = "none") -> float:
        """What a trained sample costs beside `flops_per_sample`, where activations are computed again (`flops.recomputed_flops`)."""
        return flops.recomputed_flops(self, seq_len, target_len, checkpointing=checkpointing)

    def flops_per_token(self, seq_len: int, target_len: int | None = None) -> float:
        """Floating-point operations of forward and backward a trained token, the backward twice the forward; no recomputation.

        Matrix products only, attention in full (PaLM, 2204.02311, appendix B) but a window as its width: `txtrain.model.flops`. With
        two stacks it is a token of the source and its share of the target; for images a position.
        """
        return self.flops_per_sample(seq_len, target_len) / seq_len

    def cache_bytes(self, seq_len: int, source_len: int = 0, bytes_per_value: int = 2) -> int:
        """What the cache of one row holds after seq_len tokens; a windowed layer forgets, an encoder alone has none."""
        return flops.cache_values(self, seq_len, source_len) * bytes_per_value

    @property
    def preset(self) -> str:
        """What `model=` calls it: the family alone is one at laptop size."""
        return self.family if self.size == LAPTOP else f"{self.family}_{self.size}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `txtrain.ground.convert.build(ModelConfig, d)` reads them back."""
        made: dict[str, Any] = plain(self)
        return made

    # What transformers.Trainer and its callbacks ask of a config beside to_dict.

    def to_json_string(self) -> str:
        import json

        return json.dumps(self.to_dict(), indent=2)

    def get_text_config(self) -> SimpleNamespace:
        """Where the trainer writes the ids of its tokenizer: a copy, since a config is a value."""
        return SimpleNamespace(bos_token_id=self.bos_token_id, eos_token_id=self.eos_token_id, pad_token_id=self.pad_token_id)


@dc.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen: what the verb `generate` and `txtrain.generate` have in common."""

    max_new_tokens: int = knob(64, at_least=1)
    temperature: float = knob(0.8, at_least=0)  # 0: the most likely token
    top_k: int | None = knob(None, at_least=1)  # tokens to draw from; null: all
    top_p: float | None = knob(None, above=0, at_most=1)
    min_p: float | None = knob(None, above=0, at_most=1)
    seed: int | None = knob(0, at_least=-(2**63), below=2**64)  # null: of torch's own generator

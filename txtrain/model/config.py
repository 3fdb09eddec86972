"""ModelConfig: one transformer's values, legality and closed forms. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

from txtrain.errors import shorten
from txtrain.ground.convert import plain
from txtrain.model import flops, rules
from txtrain.model import options as options  # registers the options of all axes
from txtrain.model.shape import LAPTOP, ModelShape
from txtrain.registry import config, knob, out_of_range

_FAMILY = re.compile(r"\w[\w .+-]{0,59}")


class ModelConfig(ModelShape):
    """A model's shape, legality and cost. Not a dataclass: transformers.Trainer sets other names than fields."""


    def check(self) -> Iterator[str]:
        """Problems as sentences; none if the model can be built."""
        if not _FAMILY.fullmatch(self.family):  # it names a file of defaults, an exported file and a run's folder
            allowed = "a word of at most 60 letters, digits, spaces and signs of _ . + -"
            yield f"`model.family` must be {allowed}, but is {shorten(repr(self.family))} instead."
        problems = list(out_of_range(self, "model"))
        yield from problems
        if problems:
            return  # the rest computes with these numbers
        if (depth := self.mtp_depth) >= (n := self.max_seq_len):
            yield f"`model.mtp_depth` must be below max_seq_len ({n}), but is {depth} instead. Nearest: {n - 1}."
        yield from rules.problems(self)
        for _, component in self.components():
            yield from component.check(self)

    def n_params_by_part(self) -> dict[str, int]:
        """Trainable parameters by part. A tied head owns no matrix; `mtp` is multi-token prediction."""
        decoder, layers = range(self.n_layers), (*range(self.n_layers), *range(self.encoder_layers))
        two_stacks = self.encoder_layers > 0
        n_stacks, crossed = 1 + two_stacks, decoder if two_stacks else ()
        n_sublayers, final_norms = 2 * len(layers) + len(crossed), n_stacks if self.has_final_norm else 0
        return {
            "embedding": self.embedding.n_params(self) * (1 if self.share_embeddings else n_stacks),
            "position": self.position.n_params(self) * n_stacks,
            "attention": sum(self.attention.n_params(self, i) for i in layers),
            "cross_attention": sum(self.attention.n_params(self, i) for i in crossed),
            "ffn": sum(self.ffn.n_params(self, i) for i in layers),
            "norms": n_sublayers * self.residual.n_params(self) + self.norm.n_params(self) * final_norms,
            "head": self.head.n_params(self),
            "mtp": sum(self._mtp_params(self.n_layers + i) for i in range(self.mtp_depth)),
        }

    def _mtp_params(self, layer: int) -> int:
        """One MTP module: projection, two norms before it, a block as that layer's, a norm before the head."""
        block = self.attention.n_params(self, layer) + self.ffn.n_params(self, layer) + 2 * self.residual.n_params(self)
        return 2 * self.dim**2 + block + (3 if self.has_final_norm else 2) * int(self.norm.n_params(self))

    @property
    def n_params(self) -> int:
        return sum(self.n_params_by_part().values())

    @property
    def n_active_params(self) -> int:
        """Parameters that a token's logits use: the experts that it visits, and no multi-token prediction."""
        parts = self.n_params_by_part()
        layers = (*range(self.n_layers), *range(self.encoder_layers))
        active = sum(self.ffn.n_active_params(self, i) for i in layers)
        return sum(parts.values()) - parts["mtp"] - parts["ffn"] + active

    def forward_flops(self, batch_size: int, seq_len: int, target_len: int | None = None) -> int:
        """FLOPs of one forward pass with all logits, MTP's included, as FlopCounterMode counts the plain formula.

        seq_len: of the source where there are two stacks; target_len: of the target; None: seq_len.
        """
        forward = flops.forward_by_part(self, seq_len, target_len, dense=True, training=True)
        return round(batch_size * sum(forward.values()))

    def flops_per_sample(self, seq_len: int, target_len: int | None = None, target_share: float = 1.0) -> float:
        """As `flops_per_token`, per sequence, pair or image. target_share: see `flops.forward_by_part`."""
        useful = partial(flops.forward_by_part, dense=False, training=True)
        return flops.training_flops(useful(self, seq_len, target_len, target_share=target_share))

    def recomputed_flops(self, seq_len: int, target_len: int | None = None, checkpointing: str | int = "none") -> float:
        """FLOPs per sample that activation checkpointing adds to `flops_per_sample` (`flops.recomputed_flops`)."""
        return flops.recomputed_flops(self, seq_len, target_len, checkpointing=checkpointing)

    def flops_per_token(self, seq_len: int, target_len: int | None = None) -> float:
        """FLOPs of forward and backward per trained token, the backward twice the forward, without recomputation.

        Matrix products only; a causal mask counts in full, a window as its width (`txtrain.model.flops`). With two
        stacks, per token of the source with its share of the target; for images, per position.
        """
        return self.flops_per_sample(seq_len, target_len) / seq_len

    def cache_bytes(self, seq_len: int, source_len: int = 0, bytes_per_value: int = 2) -> int:
        """Bytes of one row's cache after seq_len tokens (`flops.cache_values`)."""
        return flops.cache_values(self, seq_len, source_len) * bytes_per_value

    @property
    def preset(self) -> str:
        """Its name for `model=`: the family alone at laptop size."""
        return self.family if self.size == LAPTOP else f"{self.family}_{self.size}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `txtrain.ground.convert.build(ModelConfig, d)` reads them back."""
        made: dict[str, Any] = plain(self)
        return made

    # transformers.Trainer and its callbacks also want these two.

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def get_text_config(self) -> SimpleNamespace:
        """A copy, into which the trainer writes its tokenizer's ids."""
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        return SimpleNamespace(**{name: getattr(self, name) for name in names})


@config
class Sampling:
    """How tokens are chosen, by the verb `generate` and by `txtrain.generate`."""

    max_new_tokens: int = knob(64, at_least=1)
    # 0: the most likely token; null: 0.8, or 0 with num_beams
    temperature: float | None = knob(None, at_least=0)
    top_k: int | None = knob(None, at_least=1)  # tokens to draw from; null: all
    top_p: float | None = knob(None, above=0, at_most=1)
    min_p: float | None = knob(None, above=0, at_most=1)
    # above 1: tokens that stand in the prompt or were generated become less likely
    repetition_penalty: float = knob(1.0, above=0)
    num_beams: int = knob(1, at_least=1)  # beam search; 1: none
    n: int = knob(1, at_least=1)  # samples of each prompt; with num_beams the best so many
    stop: tuple[str, ...] = ()  # a text ends before any of these strings
    # of the draws, with a row's own number, whatever the batch and the processes; null: a new one each time
    seed: int | None = knob(0, at_least=-(2**63), below=2**64)

    @property
    def heat(self) -> float:
        """The temperature that is used."""
        return self.temperature if self.temperature is not None else 0.8 if self.num_beams == 1 else 0.0

    def check(self) -> Iterator[str]:
        if any(not text for text in self.stop):
            yield "`stop` must be a list of strings that are not empty, but holds '' instead."
        if self.num_beams == 1:
            return
        unread = {"temperature": 0, "top_k": None, "top_p": None, "min_p": None}
        for name, allowed in unread.items():
            if (value := getattr(self, name)) not in (allowed, None):
                nearest = "null" if allowed is None else allowed
                given = f"{nearest} with num_beams={self.num_beams}, but is {value} instead"
                yield f"`{name}` must be {given}: beams are not sampled. Nearest: {nearest}."
        if self.n > self.num_beams:
            yield f"`n` must be at most num_beams ({self.num_beams}), but is {self.n} instead."

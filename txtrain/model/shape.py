"""ModelShape: the values of one transformer, as every option's config sees them. No torch."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterator
from typing import Any, Literal

from txtrain.registry import TABLE, axis, choice, config, dropout_knob, knob

LAPTOP = "laptop"


@config
class InitConfig:
    """Initialisation of weights. Biases always start at 0, norms at the identity."""

    # Of matrices; embeddings are always normal or truncated normal.
    distribution: Literal["normal", "truncated_normal", "xavier_uniform", "fan_in"] = "normal"
    std: float = knob(0.02, at_least=0)  # fan_in (T5): divided by the square root of a matrix's inputs
    embedding_std: float | None = knob(None, at_least=0)  # null: std
    position_std: float | None = knob(None, at_least=0)  # of learned positions; null: std
    head_std: float | None = knob(None, at_least=0)  # of an untied output matrix; null: as other matrices
    scale_residual: bool = False  # matrices that write into the residual stream divided by sqrt(2 n_layers) (GPT-2)


@config
class ModelShape:
    """A transformer. `family`, `size` and `published` are labels: nothing in the model depends on them.

    attention, ffn, position, norm, embedding and head each hold the config of one option (`txtrain.model.options`).
    """

    family: str = knob(affects="label")
    size: str = knob(LAPTOP, affects="label")
    # The family's published models and their parameters.
    published: dict[str, int] = dc.field(default_factory=dict, metadata={"affects": "label"})

    topology: Literal["decoder", "encoder", "encoder_decoder"] = "decoder"
    n_layers: int = knob(at_least=1)  # of the decoder where there are two stacks
    n_encoder_layers: int | None = knob(None, at_least=1)  # encoder_decoder; null: n_layers
    dim: int = knob(at_least=1)
    n_heads: int = knob(at_least=1)
    vocab_size: int = knob(at_least=0)  # 0 for images
    max_seq_len: int = knob(at_least=1)
    dropout: float = dropout_knob()  # of the summed embeddings and of each sublayer's output
    output_dropout: float = dropout_knob()  # of a stack's output (T5)

    norm_position: str = choice("norm_position", "pre")
    final_norm: bool | None = None  # after the last block; null: yes, unless the norm position is post
    attention: Any = axis("attention")
    ffn: Any = axis("ffn")
    position: Any = axis("position")
    norm: Any = axis("norm")
    embedding: Any = axis("embedding")
    head: Any = axis("head")
    share_embeddings: bool = True  # encoder_decoder: source and target share one table
    tie_word_embeddings: bool = True
    logit_softcap: float | None = knob(None, above=0)  # softcap * tanh(logits / softcap)
    # No upper bound: Hugging Face's configs of small models keep GPT-2's 50256, which such a model never generates.
    bos_token_id: int | None = knob(None, at_least=0, affects="ids")  # null: the tokenizer's, once it is known
    eos_token_id: int | tuple[int, ...] | None = knob(None, at_least=0, affects="ids")  # any of several ends a text
    pad_token_id: int | None = knob(None, at_least=0, affects="ids")
    # encoder_decoder: first token of the decoder's input; null: pad_token_id.
    decoder_start_token_id: int | None = knob(None, at_least=0, affects="training")
    mtp_depth: int = knob(0, at_least=0)  # tokens beyond the next that training predicts, a module each (DeepSeek-V3)
    init: InitConfig = knob(InitConfig(), affects="init")

    def components(self) -> Iterator[tuple[str, Any]]:
        """The chosen option of each axis, norm position included."""
        for f in dc.fields(self):
            if "axis" in f.metadata:
                yield f.name, getattr(self, f.name)
        yield "norm_position", self.residual

    @property
    def residual(self) -> Any:
        return TABLE["norm_position"][self.norm_position].config(type=self.norm_position)

    @property
    def has_final_norm(self) -> bool:
        return not self.residual.normalises_stream if self.final_norm is None else bool(self.final_norm)

    @property
    def counts_tokens(self) -> bool:
        """Whether a causal stack must know its padding: experts count their tokens, dynamic RoPE those of a row."""
        scaling = self.position.scaling
        return self.ffn.n_experts > 0 or (scaling is not None and scaling.by_length)

    @property
    def encoder_layers(self) -> int:
        """Layers of the encoder beside a decoder; 0 where there is one stack."""
        return (self.n_encoder_layers or self.n_layers) if self.topology == "encoder_decoder" else 0

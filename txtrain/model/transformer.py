"""The Transformer: embedding, blocks, head. One class for every family and topology."""

# B batch, T positions given, S positions seen (past + T), D model size, V vocabulary, C channels, H and W pixels

from __future__ import annotations

import dataclasses as dc
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from txtrain.errors import ConfigError
from txtrain.model.attention.cache import Cache, append
from txtrain.model.config import ModelConfig
from txtrain.model.embedding.embeddings import PatchEmbedding, TokenEmbedding
from txtrain.model.ffn.moe import AUX_LOSS, ScaleOf
from txtrain.model.head.heads import Head, LMHead
from txtrain.model.head.loss import IGNORED, cross_entropy
from txtrain.model.inputs import LABELS, Inputs, Reads, explained, outside, require
from txtrain.model.mtp import FurtherToken, further_targets
from txtrain.model.output import ModelOutput
from txtrain.model.position.encodings import Position
from txtrain.model.stack import Given, Memory, Record, Stack

Embedding = TokenEmbedding | PatchEmbedding


@dc.dataclass(frozen=True)
class Read:
    """One stack's last hidden state [B, T, D], what was known of its tokens, and their vectors [B, T, D] as they were looked up."""

    x_BTD: Tensor
    given: Given
    vectors_BTD: Tensor


class Transformer(Stack):
    """A decoder, an encoder, or (with `encoder`) both. Forward takes and returns what Hugging Face users expect, and changes nothing here.

    The stack that ends in the head is this module itself (`blocks.0...`); an encoder beside it is `encoder.blocks.0...`.
    Build it with `txtrain.build_model(config)`.
    """

    accepts_loss_kwargs = True  # transformers.Trainer: it may pass num_items_in_batch
    loss_type: str | None  # transformers.Trainer: ForCausalLM where labels are shifted here, so that the first of a row is no target
    tokenizer_files: Mapping[str, bytes] = MappingProxyType({})  # of the folder that it was loaded from; they go along when it is saved
    label_names: tuple[str, ...] = ()  # of the classes, as that folder has them; they go along too

    def __init__(
        self,
        config: ModelConfig,
        embedding: Embedding,
        position: Position,
        blocks: Sequence[nn.Module],
        final_norm: nn.Module | None,
        head: Head,
        encoder: Stack | None = None,
        encoder_embedding: TokenEmbedding | None = None,
        mtp: Sequence[FurtherToken] = (),
    ) -> None:
        super().__init__(position, blocks, final_norm, causal=config.topology != "encoder", output_dropout=config.output_dropout)
        self.config = config
        self.embedding = embedding
        self.dropout = nn.Dropout(config.dropout)
        self.head = head
        self.loss_type = "ForCausalLM" if head.shift else None
        self.encoder = encoder
        self.encoder_embedding = encoder_embedding  # None: the source reads `embedding`
        self.mtp = nn.ModuleList(mtp)
        self.reads = Reads(config.dim, embedding.n_channels, len(blocks), encoder is not None, head.pools)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        prefix_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        decoder_position_ids: Tensor | None = None,
        decoder_document_ids: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        mtp_items_in_batch: Sequence[Tensor | int] | None = None,
        return_logits: bool = True,
        logits_to_keep: int | Tensor = 0,
        return_log_probs: bool = False,
    ) -> ModelOutput:
        """One pass.

        Args:
            input_ids: [B, T] (of the encoder where there is one), or inputs_embeds: [B, T, D] in its place, as `self.embedding` gives them:
                scaled where it scales. For images pixel_values: [B, C, H, W].
            attention_mask: [B, T], or [B, S] with a cache; 1 for a real token, 0 for padding.
            token_type_ids: [B, T]; the segment of each token.
            position_ids: [B, T]; by default 0, 1, 2, ... after what the cache holds, restarting at each document.
            document_ids: [B, T]; tokens attend within their document only. Not with a cache.
            prefix_mask: [B, T]; true for tokens that a causal model's every token may see, also from before (prefix LM).
            decoder_input_ids, decoder_attention_mask, decoder_position_ids, decoder_document_ids: the same of the target, where there are
                two stacks; ids by default the labels shifted to the right, after the start token.
            labels: [B, T]; -100 where nothing is to be predicted. A causal model shifts them here: logits at t predict label t + 1.
                [B] for one class a sequence.
            past_key_values: what the last call returned; it is updated in place.
            num_items_in_batch: the loss is its sum over the targets divided by this; by default by the number of targets here.
            mtp_items_in_batch: the same for the loss of each further token (`mtp_losses`; mtp.py). With a cache none is predicted.
            return_logits: False computes the loss by chunks and never holds all logits.
            logits_to_keep: logits of the last so many positions only; 0: of all. Not with labels. Or a mask [B, T]: logits [n, V] of the
                positions where it is true. The loss is of all targets nevertheless. Not with a head that pools.
            return_log_probs: `log_probs` of the labels in the place of any loss: see `log_probs` below.

        Raises:
            ConfigError: inputs have a wrong shape or dtype, contradict each other, are not of this topology, or exceed
                the model's learned positions; on the CPU also: ids or labels are outside the vocabulary.
        """
        main = Inputs(input_ids, inputs_embeds, attention_mask, position_ids, document_ids, token_type_ids, pixel_values, prefix_mask)
        target = Inputs(decoder_input_ids, None, decoder_attention_mask, decoder_position_ids, decoder_document_ids)
        cache = self.new_cache() if past_key_values is None and use_cache else past_key_values
        self.reads.check(main, target, labels, cache, logits_to_keep)
        record = Record()
        main, memory = self._sides(main, target, labels, cache, record)
        read = self._read(self, self.embedding, main, cache, memory, record)
        x_BTD, valid_BT = read.x_BTD, read.given.valid_BS
        out = ModelOutput(past_key_values=cache, last_hidden_state=x_BTD, encoder_last_hidden_state=None if memory is None else memory.output_BSD)
        out.nsp_logits = self.head.sentence_logits(x_BTD)
        masked = isinstance(logits_to_keep, Tensor)
        if return_logits:
            out.logits = self.head(_kept(x_BTD, logits_to_keep), self.embedding.weight_VD, valid_BT)
        if labels is not None and return_log_probs:
            out.log_probs = self.head.log_probs(x_BTD, self.embedding.weight_VD, labels)
        elif labels is not None:
            out.loss, share = self._loss(x_BTD, None if masked else out.logits, self.head.targets(labels), num_items_in_batch, valid_BT)
        if self.mtp and cache is None and not masked and not logits_to_keep and not return_log_probs:
            self._predict_further(out, read, record, labels, mtp_items_in_batch, return_logits)
        if out.loss is not None and record.loss_scale is not None and record.has(AUX_LOSS):
            out.loss, *further = ScaleOf.apply(record.loss_scale, share, out.loss, *(out.mtp_losses or ()))
            out.mtp_losses = tuple(further) or None
        out.aux = record.statistics or None
        return out

    @property
    def max_positions(self) -> int | None:
        """Positions that the model has vectors for; None: any number."""
        return self.position.max_positions

    # ------------------------------------------------------------------------------------------------------------- inputs

    def _read(
        self,
        stack: Stack,
        embedding: Embedding,
        given: Inputs,
        cache: Cache | None = None,
        memory: Memory | None = None,
        record: Record | None = None,
        name: str = "",
    ) -> Read:
        """One sequence through one stack."""
        side = "decoder_" if self.encoder is not None and stack is self else ""  # of the inputs' names
        vectors_BTD, grid = _embedded(embedding, given, self.config.vocab_size, side)
        B, T = vectors_BTD.shape[:2]
        past = 0 if cache is None else cache.length
        if cache is not None and (given.documents is not None or (given.prefix is not None and past)):
            what = "`document_ids` must not be given together with a cache, nor a prefix_mask after its first call"
            raise ConfigError(f"{what}: they are for training.")
        limit = stack.position.max_positions
        if limit is not None and grid is None and past + T > limit:
            what = f"at most {limit - past} positions here, but has {T}"
            raise ConfigError(f"`{side}input_ids` must have {what}: model.max_seq_len is learned.")
        valid_BS = _valid(given.mask, cache, B, T)
        positions, distances = _positions(given.positions, given.documents, cache, past, T, vectors_BTD.device)
        try:
            x_BTD = stack.position.add(vectors_BTD, positions, grid)
        except IndexError as e:
            raise explained(e, f"{side}position_ids", given.positions, limit) from e
        if embedding.norm is not None:
            x_BTD = embedding.norm(x_BTD)
        prefix = None if given.prefix is None else given.prefix.bool()
        known = Given(positions, distances, valid_BS, given.documents, prefix, grid)
        x_BTD = stack.run(self.dropout(x_BTD), known, cache, memory, record, name)
        if cache is not None:
            cache.length = past + T
        return Read(x_BTD, known, vectors_BTD)

    def _sides(
        self, main: Inputs, target: Inputs, labels: Tensor | None, cache: Cache | None, record: Record
    ) -> tuple[Inputs, Memory | None]:
        """What the stack that ends in the head reads, and what it looks at: with two stacks the target, and the source as the encoder read it."""
        if self.encoder is not None:
            return self._target(target, labels), self._encoded(self.encoder, main, cache, record)
        return main, None

    def _encoded(self, encoder: Stack, source: Inputs, cache: Cache | None, record: Record) -> Memory:
        """The source read, or what the cache knows of it."""
        if cache is not None and cache.memory_length:
            return Memory(None, cache.memory_length, cache.memory_valid_BS)
        read = self._read(encoder, self.encoder_embedding or self.embedding, source, record=record, name="encoder.")
        x_BSD, valid_BS = read.x_BTD, read.given.valid_BS
        if cache is not None:
            cache.memory_length, cache.memory_valid_BS = x_BSD.shape[1], valid_BS
        return Memory(x_BSD, x_BSD.shape[1], valid_BS, source.documents)

    def _target(self, target: Inputs, labels: Tensor | None) -> Inputs:
        """Teacher forcing: the decoder reads the labels, one position later."""
        if target.ids is not None:
            return target
        assert labels is not None, "Reads.check"
        return dc.replace(target, ids=self.shifted_right(labels, target.documents))

    def shifted_right(self, labels_BT: Tensor, document_ids_BT: Tensor | None = None) -> Tensor:
        return shifted_right(self.config, labels_BT, document_ids_BT)

    # --------------------------------------------------------------------------------------------------------------- loss

    def _loss(
        self, x_BTD: Tensor, logits: Tensor | None, targets: Tensor, n_items: Tensor | int | None, valid_BT: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The loss, and which share of the batch's targets is here."""
        here = (targets != IGNORED).sum()
        denominator = torch.as_tensor(here if n_items is None else n_items, dtype=torch.float32, device=x_BTD.device)
        try:
            if logits is not None:
                return cross_entropy(logits, targets, denominator), here / denominator
            return self.head.loss(x_BTD, self.embedding.weight_VD, targets, denominator, valid_BT), here / denominator
        except (IndexError, RuntimeError) as e:
            if targets.device.type != "cpu" or "out of bounds" not in str(e):
                raise
            n = self.config.head.n_classes if self.head.pools else self.config.vocab_size
            raise explained(e, "labels", targets[targets != IGNORED], n) from e

    def _predict_further(
        self, out: ModelOutput, read: Read, record: Record, labels: Tensor | None, n_items: Sequence[Tensor | int] | None, return_logits: bool
    ) -> None:
        """Multi-token prediction: its logits, and its losses where there are labels."""
        x_BTD, logits, losses = read.x_BTD, [], []
        modules: Any = self.mtp
        for i, module in enumerate(modules):
            k, n = i + 1, x_BTD.shape[1] - 1
            if n < 1 or (labels is None and not return_logits):
                break
            through = partial(self.through, {f"mtp.{i}.block": module.block}, given=read.given.first(n), record=record)
            x_BTD, entering_BTD = module(x_BTD[:, :n], read.vectors_BTD[:, k:], through)
            if return_logits:
                logits.append(self.head(entering_BTD, self.embedding.weight_VD))
            if labels is not None:
                targets = further_targets(labels, read.given.documents_BS, k)
                items = None if n_items is None else n_items[i]
                losses.append(self._loss(entering_BTD, logits[-1] if return_logits else None, targets, items, None)[0])
        out.mtp_logits, out.mtp_losses = tuple(logits) or None, tuple(losses) or None


def log_probs(model: Any, input_ids: Tensor, labels: Tensor, **inputs: Any) -> Tensor:
    """Log-probability of each label, differentiable; all logits are never held at once.

    Args:
        model: of `txtrain.build_model` or `txtrain.load_pretrained`, with a head over the vocabulary.
        input_ids: [B, T]; with an encoder and a decoder [B, S], what the encoder reads.
        labels: [B, T], -100 where nothing is asked for; with two stacks the target.
        inputs: what else `Transformer.forward` takes, such as attention_mask, document_ids or decoder_input_ids.

    Returns:
        [B, T], at t of label t, at least float32; 0 where the label is -100. A causal model (`model.head.shift`)
        predicts label t at position t - 1, so that the first label of a row has 0; other models predict it at t.

    Raises:
        ConfigError: the head is not over the vocabulary, a label is not of it, or inputs are not what the model reads.
    """
    if not isinstance(model, Transformer) or not isinstance(model.head, LMHead):
        what = "a model of txtrain.build_model or txtrain.load_pretrained with a head over the vocabulary"
        found = model.config.head.type if isinstance(model, Transformer) else type(model).__name__
        raise ConfigError(f"`model` must be {what}, but is {found} instead.")
    require("labels", labels, {"B": None, "T": None}, LABELS)
    if error := outside("labels", labels[labels != IGNORED], model.config.vocab_size):
        raise error
    out: ModelOutput = model(input_ids, labels=labels, return_logits=False, return_log_probs=True, **inputs)
    assert out.log_probs is not None
    return out.log_probs


def _signature_with(function: Callable[..., Any], name: str) -> inspect.Signature:
    """The function's own, and one keyword more: what trainers and collators look at."""
    known = inspect.signature(function)
    return known.replace(parameters=[*known.parameters.values(), inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)])


class SentencePairTransformer(Transformer):
    """With a head that tells whether the second sentence follows the first (BERT).

    A class of its own because `transformers.Trainer` takes every parameter of forward with "label" in its name for one that each batch has.
    """

    def forward(self, *inputs: Any, next_sentence_label: Tensor | None = None, **named: Any) -> ModelOutput:
        """As `Transformer.forward`. next_sentence_label: [B]; 0 if the second sentence follows the first, 1 if not. Its loss is added."""
        out = super().forward(*inputs, **named)
        if next_sentence_label is not None:
            assert out.nsp_logits is not None
            require("next_sentence_label", next_sentence_label, {"B": len(out.nsp_logits)}, LABELS)
            loss = cross_entropy(out.nsp_logits, next_sentence_label, (next_sentence_label != IGNORED).sum())
            out.loss = loss if out.loss is None else out.loss + loss
        return out

    forward.__signature__ = _signature_with(Transformer.forward, "next_sentence_label")  # type: ignore[attr-defined]


def _embedded(
    embedding: Embedding, given: Inputs, vocab_size: int, side: str
) -> tuple[Tensor, tuple[int, int] | None]:
    """Vectors [B, T, D], and the rows and columns of patches where they are an image's."""
    if isinstance(embedding, PatchEmbedding):
        return embedding(given.pixels)
    try:
        x_BTD = embedding(given.ids) if given.embeds is None else given.embeds
    except IndexError as e:
        raise explained(e, f"{side}input_ids", given.ids, vocab_size) from e
    try:
        return embedding.add_types(x_BTD, given.types), None
    except IndexError as e:
        raise explained(e, "token_type_ids", given.types, embedding.n_types) from e


def _kept(x_BTD: Tensor, positions: int | Tensor) -> Tensor:
    """The last so many positions (0: all), [B, positions, D], or those where a mask [B, T] is true, [n, D]."""
    return x_BTD[positions] if isinstance(positions, Tensor) else x_BTD[:, -positions:]


def _valid(attention_mask: Tensor | None, cache: Cache | None, B: int, T: int) -> Tensor | None:
    """[B, S] True for real tokens, or None where all are; remembered in the cache."""
    past = 0 if cache is None else cache.length
    known = None if cache is None else cache.valid_BS
    if attention_mask is None:
        if known is None:
            return None
        attention_mask = torch.ones(B, T, dtype=torch.bool, device=known.device)
    valid = attention_mask.bool()
    if valid.shape[1] != past + T:
        valid = append(torch.ones(1, past, dtype=torch.bool, device=valid.device) if known is None else known, valid)
    if valid.device.type == "cpu" and not torch.compiler.is_compiling() and bool(valid.all()):
        return None  # collators often send a mask of ones; on a GPU the look would wait for the device
    if cache is not None:
        cache.valid_BS = valid
    return valid


def _positions(
    position_ids: Tensor | None, document_ids: Tensor | None, cache: Cache | None, past: int, T: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Position ids of the new tokens [B or 1, T], and of all keys [B or 1, S] for distances.

    Distances between default positions are those between indices, also within a document that starts later: no batch dimension.
    """
    index_1S = torch.arange(past + T, device=device)[None]
    if position_ids is not None:
        if cache is None:
            return position_ids, position_ids
        cache.positions_BS = append(index_1S[:, :past] if cache.positions_BS is None else cache.positions_BS, position_ids)
        return position_ids, cache.positions_BS
    if document_ids is not None:
        starts = torch.ones_like(document_ids, dtype=torch.bool)
        starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
        return index_1S - torch.where(starts, index_1S, 0).cummax(dim=1).values, index_1S
    if cache is not None and cache.positions_BS is not None:
        raise ConfigError("`position_ids` must be given again: this cache was filled with explicit ones.")
    return index_1S[:, past:], index_1S


def shifted_right(config: ModelConfig, labels_BT: Tensor, document_ids_BT: Tensor | None = None) -> Tensor:
    """What the decoder reads to predict these labels: the start token, then all but the last of them; so in each document of a row."""
    start = config.decoder_start_token_id
    pad = config.pad_token_id or 0
    start = pad if start is None else start
    first = labels_BT.new_full((len(labels_BT), 1), start)
    before_BT = labels_BT[:, :-1].masked_fill(labels_BT[:, :-1] == IGNORED, pad)
    if document_ids_BT is not None:
        before_BT = before_BT.masked_fill(document_ids_BT[:, 1:] != document_ids_BT[:, :-1], start)
    return torch.cat((first, before_BT), dim=1)

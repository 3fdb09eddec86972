"""The Transformer: embedding, blocks, head. One class for every family and topology."""

# B batch, T positions given, S positions seen (past + T), D model size, V vocabulary, C channels, H and W pixels

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from txtrain.errors import ConfigError
from txtrain.model.attention.cache import Cache, append
from txtrain.model.attention.mask import document_starts
from txtrain.model.config import ModelConfig
from txtrain.model.embedding.embeddings import PatchEmbedding, TokenEmbedding
from txtrain.model.ffn.moe import AUX_LOSS, ScaleOf
from txtrain.model.head.heads import ClassHead, Head, LMHead
from txtrain.model.head.loss import IGNORED
from txtrain.model.inputs import LABELS, Inputs, Reads, explained, outside, require
from txtrain.model.mtp import MTPModule, further_targets
from txtrain.model.output import ModelOutput
from txtrain.model.position.encodings import Position
from txtrain.model.stack import EncoderOutput, Given, Record, Stack

Embedding = TokenEmbedding | PatchEmbedding
LossOf = Callable[[Any, Tensor, Tensor | None], Tensor]


@dc.dataclass(frozen=True)
class Read:
    """One stack's last hidden state [B, T, D], its tokens, and their embeddings [B, T, D]."""

    x_BTD: Tensor
    given: Given
    vectors_BTD: Tensor


class Transformer(Stack):
    """A decoder, an encoder, or (with `encoder`) both, built by `txtrain.build_model`. Forward changes nothing here.

    The stack that ends in the head is this module itself (`blocks.0...`); an encoder is `encoder.blocks.0...`.
    """

    accepts_loss_kwargs = True  # transformers.Trainer may pass num_items_in_batch
    loss_type: str | None  # ForCausalLM tells transformers.Trainer that labels are shifted here
    tokenizer_files: Mapping[str, bytes] = MappingProxyType({})  # of the folder that it was loaded from, for saving
    generation_file: bytes = b""  # the folder's generation_config.json, for saving
    banned_tokens: tuple[int, ...] = ()  # of the folder's bad_words_ids: generation writes none of them
    prefix_prompts = False  # it was trained to read a prompt from both sides: generation does too (prefix LM)
    # names of the tensors that its checkpoints hold: an adapter's, and of what is trained beside it; None: all
    kept: frozenset[str] | None = None

    def __init__(
        self, config: ModelConfig, embedding: Embedding, position: Position, blocks: Sequence[nn.Module],
        final_norm: nn.Module | None, head: Head, encoder: Stack | None = None,
        encoder_embedding: TokenEmbedding | None = None, mtp: Sequence[MTPModule] = (),
    ) -> None:
        super().__init__(position, blocks, final_norm, config.topology != "encoder", config.output_dropout)
        self.config = config
        self.embedding = embedding
        self.dropout = nn.Dropout(config.dropout)
        self.head = head
        self.loss_type = "ForCausalLM" if head.shift else None
        self.encoder = encoder
        self.encoder_embedding = encoder_embedding  # None: the encoder reads `embedding`
        self.mtp = nn.ModuleList(mtp)
        of_head = head.pools, head.check_labels
        self.reads = Reads(config.dim, embedding.n_channels, len(blocks), encoder is not None, *of_head)

    def forward(
        self,
        input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None, position_ids: Tensor | None = None,
        document_ids: Tensor | None = None, inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None, prefix_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None, decoder_attention_mask: Tensor | None = None,
        decoder_position_ids: Tensor | None = None, decoder_document_ids: Tensor | None = None,
        labels: Tensor | None = None, past_key_values: Cache | None = None, use_cache: bool = False,
        num_items_in_batch: Tensor | int | None = None, mtp_items_in_batch: Sequence[Tensor | int] | None = None,
        return_logits: bool = True, logits_to_keep: int | Tensor = 0, return_log_probs: bool = False,
        lm_targets: Tensor | None = None, lm_items_in_batch: Tensor | int | None = None,
        loss_of: LossOf | None = None,
    ) -> ModelOutput:
        """One pass, with Hugging Face's arguments.

        Args:
            input_ids: [B, T], of the encoder if there is one; or inputs_embeds: [B, T, D], scaled if `self.embedding`
                scales; or pixel_values: [B, C, H, W].
            attention_mask: [B, T], or [B, S] with a cache; 1 for a real token, 0 for padding.
            token_type_ids: [B, T]; the segment of each token.
            position_ids: [B, T]; by default 0, 1, 2, ... after the cache, restarting at each document.
            document_ids: [B, T]; tokens attend within their document only. Not with a cache.
            prefix_mask: [B, T]; true for tokens that every position of a causal model may see (prefix LM).
            decoder_input_ids, decoder_attention_mask, decoder_position_ids, decoder_document_ids: the same for the
                decoder beside an encoder; ids by default the labels shifted right, after the start token: where tokens
                are counted (experts), up to the last label.
            labels: [B, T]; -100: no target. A causal model shifts them: logits at t predict label t + 1. With a class
                head [B]: of one class; [B, classes], floats: of any number of them, or numbers (model.head.kind).
            past_key_values: what the last call returned; updated in place.
            num_items_in_batch: the loss is its sum divided by this; by default by the number of targets.
            mtp_items_in_batch: the same for each of `mtp_losses` (mtp.py). There is no MTP with a cache.
            return_logits: False computes the loss by chunks and never holds all logits.
            logits_to_keep: logits of the last so many positions; 0: of all. Not with labels. Or a mask [B, T]: logits
                [n, V] where it is true; the loss is still of all targets. Not with a head that pools.
            lm_targets: [B, T], the input_ids, -100: not a target; for `lm_loss`, that of the next tokens beside a class
                (model.head.lm); lm_items_in_batch: as num_items_in_batch.
            return_log_probs: `log_probs` of the labels instead of a loss, see the function `log_probs`.
            loss_of: computes `loss` instead of the head, within this forward, where all of the head's weights are here:
                of the head, its input [B, T, D], or the logits [B, C] of one that pools, and the weight of the
                embedding, for a tied head. With labels.

        Raises:
            ConfigError: inputs have a wrong shape or dtype, contradict each other, do not fit this topology, or exceed
                the model's learned positions; on the CPU also: ids or labels are outside the vocabulary.
        """
        beside = token_type_ids, pixel_values, prefix_mask
        main = Inputs(input_ids, inputs_embeds, attention_mask, position_ids, document_ids, *beside)
        target = Inputs(decoder_input_ids, None, decoder_attention_mask, decoder_position_ids, decoder_document_ids)
        cache = self.new_cache() if past_key_values is None and use_cache else past_key_values
        self.reads.check(main, target, labels, cache, logits_to_keep)
        record, encoded, source = Record(), None, main
        if self.encoder is not None:
            target = self._forced(main, labels, target) if target.ids is None else target
            encoded, main = self._encoded(self.encoder, main, cache, record), target
        read = self._read(self, main, record, cache, encoded)
        x_BTD = read.x_BTD
        valid_BT = self._pooled_from(source, read.given.valid_BS) if self.head.pools else None
        out = ModelOutput(past_key_values=cache, last_hidden_state=x_BTD)
        out.encoder_last_hidden_state = None if encoded is None else encoded.output_BSD
        out.nsp_logits = self.head.sentence_logits(x_BTD)
        masked, logits = isinstance(logits_to_keep, Tensor), None
        if return_logits or self.head.pools:
            kept = x_BTD[logits_to_keep] if isinstance(logits_to_keep, Tensor) else x_BTD[:, -logits_to_keep:]
            logits = self.head(kept, self.embedding.weight_VD, valid_BT)
        out.logits = logits if return_logits else None
        if labels is not None and return_log_probs:
            out.log_probs = self.head.log_probs(x_BTD, self.embedding.weight_VD, labels)
        elif labels is not None:
            targets = self.head.targets(labels)
            out.loss, share = self._loss(x_BTD, None if masked else logits, targets, num_items_in_batch, loss_of)
        if lm_targets is not None and isinstance(self.head, ClassHead):
            n = (lm_targets[:, 1:] != IGNORED).sum() if lm_items_in_batch is None else lm_items_in_batch
            n = torch.as_tensor(n, dtype=torch.float32, device=x_BTD.device)
            out.lm_loss = self.head.token_loss(x_BTD, self.embedding.weight_VD, lm_targets, n)
        own = loss_of is None and not return_log_probs
        if self.mtp and cache is None and not masked and not logits_to_keep and own:
            self._predict_further(out, read, record, labels, mtp_items_in_batch, return_logits)
        if any(name.endswith(f".{AUX_LOSS}") for name in record.statistics):
            out.loss_scale = record.loss_scale
        if out.loss is not None and out.loss_scale is not None:
            out.loss, *further = ScaleOf.apply(out.loss_scale, share, out.loss, *(out.mtp_losses or ()))
            out.mtp_losses = tuple(further) or None
        out.aux = record.statistics or None
        return out

    def _pooled_from(self, source: Inputs, valid_BS: Tensor | None) -> Tensor | None:
        """The real tokens, of which a head pools. None: all. Without a mask those that are not the padding token, as in
        transformers, whose classes know padding by that token alone."""
        if source.mask is not None:
            return source.mask.bool() if self.encoder is not None else valid_BS
        pad = self.config.pad_token_id
        return None if source.ids is None or pad is None else source.ids != pad

    @property
    def max_positions(self) -> int | None:
        """Number of learned positions; None: unlimited."""
        return self.position.max_positions

    def _read(
        self, stack: Stack, given: Inputs, record: Record, cache: Cache | None = None,
        encoded: EncoderOutput | None = None,
    ) -> Read:
        """One sequence through one stack."""
        own, side = stack is self, "decoder_" if self.encoder is not None and stack is self else ""
        embedding = self.embedding if own else self.encoder_embedding or self.embedding
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
        x_BTD = stack.run(self.dropout(x_BTD), known, cache, encoded, record, "" if own else "encoder.")
        if cache is not None:
            cache.length = past + T
        return Read(x_BTD, known, vectors_BTD)

    def _encoded(self, encoder: Stack, source: Inputs, cache: Cache | None, record: Record) -> EncoderOutput:
        """The encoder's output for the source, or what the cache knows of it."""
        if cache is not None and cache.encoder_length:
            return EncoderOutput(None, cache.encoder_length, cache.encoder_valid_BS)
        read = self._read(encoder, source, record)
        x_BSD, valid_BS = read.x_BTD, read.given.valid_BS
        if cache is not None:
            cache.encoder_length, cache.encoder_valid_BS = x_BSD.shape[1], valid_BS
        return EncoderOutput(x_BSD, x_BSD.shape[1], valid_BS, source.documents)

    def _forced(self, source: Inputs, labels: Tensor | None, target: Inputs) -> Inputs:
        """Teacher forcing: the decoder reads the labels; for a class it reads the source again."""
        read_again, mask = source.ids if self.head.pools else labels, target.mask
        assert read_again is not None, "Reads.check"
        if mask is None and self.config.counts_tokens:  # for others what comes behind a row changes nothing
            mask = source.mask if self.head.pools else (read_again != IGNORED).flip(1).cumsum(1).flip(1) > 0
        return dc.replace(target, ids=self.shifted_right(read_again, target.documents), mask=mask)

    def shifted_right(self, labels_BT: Tensor, document_ids_BT: Tensor | None = None) -> Tensor:
        return shifted_right(self.config, labels_BT, document_ids_BT)

    def _loss(
        self, x_BTD: Tensor, logits: Tensor | None, targets: Tensor, n_items: Tensor | int | None,
        loss_of: LossOf | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The loss, and the share of the batch's targets that is here."""
        here = self.head.n_targets(targets)
        denominator = torch.as_tensor(here if n_items is None else n_items, dtype=torch.float32, device=x_BTD.device)
        try:
            if loss_of is not None:
                read = logits if self.head.pools and logits is not None else x_BTD
                return loss_of(self.head, read, self.embedding.weight_VD), here / denominator
            if logits is not None:
                return self.head.loss_of(logits, targets, denominator), here / denominator
            return self.head.loss(x_BTD, self.embedding.weight_VD, targets, denominator), here / denominator
        except (IndexError, RuntimeError) as e:
            if targets.device.type != "cpu" or "out of bounds" not in str(e):
                raise
            n = self.config.head.n_outputs if self.head.pools else self.config.vocab_size
            raise explained(e, "labels", targets[targets != IGNORED], n) from e

    def _predict_further(
        self, out: ModelOutput, read: Read, record: Record, labels: Tensor | None,
        n_items: Sequence[Tensor | int] | None, return_logits: bool,
    ) -> None:
        """MTP: its logits, and its losses where there are labels."""
        x_BTD, logits, losses = read.x_BTD, [], []
        modules: Any = self.mtp
        for i, module in enumerate(modules):
            k, short = i + 1, x_BTD.shape[1] < 2
            if labels is None and (short or not return_logits):
                break
            # Rows too short for a depth have no target of it. In training one position goes through all the same: under
            # FSDP the other ranks wait for this one to use the module.
            n = 1 if short else x_BTD.shape[1] - 1
            through = partial(self.through, {f"mtp.{i}.block": module.block}, given=read.given.first(n), record=record)
            x_BTD, entering_BTD = module(x_BTD[:, :n], read.vectors_BTD[:, -1 if short else k :], through)
            if return_logits and not short:
                logits.append(self.head(entering_BTD, self.embedding.weight_VD))
            if labels is not None:
                none = labels.new_full((len(labels), 1), IGNORED)
                targets = none if short else further_targets(labels, read.given.documents_BS, k)
                items = 1 if short else None if n_items is None else n_items[i]
                whole = logits[-1] if return_logits and not short else None
                losses.append(self._loss(entering_BTD, whole, targets, items)[0])
        out.mtp_logits, out.mtp_losses = tuple(logits) or None, tuple(losses) or None


def log_probs(model: Any, input_ids: Tensor, labels: Tensor, **inputs: Any) -> Tensor:
    """Log-probability of each label, differentiable, without holding all logits at once.

    Args:
        model: of `txtrain.build_model` or `txtrain.load_pretrained`, with a head over the vocabulary.
        input_ids: [B, T]; with an encoder and a decoder [B, S], the encoder's.
        labels: [B, T], -100: not asked for; the target's with two stacks.
        inputs: further arguments of `Transformer.forward`, such as attention_mask, document_ids or decoder_input_ids.

    Returns:
        [B, T], at t of label t, at least float32; 0 where the label is -100. A causal model (`model.head.shift`)
        predicts label t at position t - 1, so that the first label of a row has 0; other models predict it at t.

    Raises:
        ConfigError: the head is not over the vocabulary, a label is outside it, or inputs do not fit the model.
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


def _embedded(
    embedding: Embedding, given: Inputs, vocab_size: int, side: str
) -> tuple[Tensor, tuple[int, int] | None]:
    """Vectors [B, T, D], and the rows and columns of an image's patches."""
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


def _valid(attention_mask: Tensor | None, cache: Cache | None, B: int, T: int) -> Tensor | None:
    """[B, S] True for real tokens, or None where all are; kept in the cache."""
    past, known = (0, None) if cache is None else (cache.length, cache.valid_BS)
    if attention_mask is None:
        if known is None:
            return None
        attention_mask = torch.ones(B, T, dtype=torch.bool, device=known.device)
    valid = attention_mask.bool()
    if valid.shape[1] != past + T:
        valid = append(valid.new_ones(1, past) if known is None else known, valid)
    if valid.device.type == "cpu" and not torch.compiler.is_compiling() and bool(valid.all()):
        if cache is not None:
            cache.valid_BS = None  # the padded rows have left
        return None  # collators often send a mask of ones; on a GPU the test would wait for the device
    if cache is not None:
        cache.valid_BS = valid
    return valid


def _positions(
    position_ids: Tensor | None, document_ids: Tensor | None, cache: Cache | None, past: int, T: int, device: Any
) -> tuple[Tensor, Tensor]:
    """Position ids of the new tokens [B or 1, T], and of all keys [B or 1, S] for distances (by default indices)."""
    index_1S = torch.arange(past + T, device=device)[None]
    if position_ids is not None:
        if cache is None:
            return position_ids, position_ids
        before = index_1S[:, :past] if cache.positions_BS is None else cache.positions_BS
        cache.positions_BS = append(before, position_ids)
        return position_ids, cache.positions_BS
    if document_ids is not None:
        return index_1S - torch.where(document_starts(document_ids), index_1S, 0).cummax(dim=1).values, index_1S
    if cache is not None and cache.positions_BS is not None:
        raise ConfigError("`position_ids` must be given again: this cache was filled with explicit ones.")
    return index_1S[:, past:], index_1S


def shifted_right(config: ModelConfig, labels_BT: Tensor, document_ids_BT: Tensor | None = None) -> Tensor:
    """The decoder's input for these labels: in each document the start token, then all labels but the last."""
    pad, start = config.pad_token_id or 0, config.decoder_start_token_id
    start = pad if start is None else start
    before_BT = F.pad(labels_BT[:, :-1].masked_fill(labels_BT[:, :-1] == IGNORED, pad), (1, 0), value=start)
    return before_BT if document_ids_BT is None else before_BT.masked_fill(document_starts(document_ids_BT), start)

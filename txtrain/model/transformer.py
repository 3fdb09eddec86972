"""The Transformer: embedding, blocks, head. One class for every family."""

# B batch, T positions given, S positions seen (past + T), D model size, V vocabulary

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from txtrain.model.attention import Context
from txtrain.model.cache import Cache, append
from txtrain.model.config import ModelConfig
from txtrain.model.embedding import TokenEmbedding
from txtrain.model.head import LMHead, cross_entropy, shifted
from txtrain.model.mask import Mask, PreparedMask, choose_kernel, prepare
from txtrain.model.output import ModelOutput
from txtrain.model.position import Position


class Stack(nn.Module):
    """Blocks of one kind with their position module and final norm: what masks, positions and caches are made for."""

    def __init__(self, position: Position, blocks: list[nn.Module], final_norm: nn.Module | None, causal: bool) -> None:
        super().__init__()
        self.position = position
        self.blocks = nn.ModuleList(blocks)
        self.final_norm = final_norm
        self.causal = causal

    def new_cache(self) -> Cache:
        return Cache([getattr(block.attention, "window", None) for block in self.blocks])

    def run(
        self, x_BTD: Tensor, position_ids_BT: Tensor, distances_BS: Tensor, valid_BS: Tensor | None, documents_BS: Tensor | None, cache: Cache | None
    ) -> Tensor:
        """[B, T, D] through all blocks. distances: the positions of all keys, of which the differences are distances."""
        declared = Mask(x_BTD.shape[1], distances_BS.shape[1], self.causal, None, documents_BS, valid_BS)
        rotation = self.position.rotation(position_ids_BT, x_BTD.dtype)
        masks: dict[tuple[Any, ...], PreparedMask] = {}
        for i, block in enumerate(self.blocks):
            layer_cache = cache.layers[i] if cache is not None else None
            n_keys = declared.n_keys if layer_cache is None else layer_cache.n_held + declared.n_queries
            key = (*_needs(block.attention), n_keys)
            if key not in masks:
                masks[key] = self._prepared(declared, *key, x_BTD, distances_BS)
            x_BTD = block(x_BTD, context=Context(masks[key], rotation, layer_cache))
        return x_BTD if self.final_norm is None else self.final_norm(x_BTD)

    def _prepared(
        self, declared: Mask, window: int | None, softcap: bool, dropout: bool, n_keys: int, x_BTD: Tensor, distances_BS: Tensor
    ) -> PreparedMask:
        mask = declared.windowed(window, n_keys)
        distances_BS = distances_BS[:, -n_keys:]
        bias = self.position.bias(distances_BS[:, -mask.n_queries :], distances_BS)
        device, dtype = x_BTD.device, x_BTD.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        half = dtype in (torch.bfloat16, torch.float16)
        kernel = choose_kernel(mask, device_type=device.type, softcap=softcap, bias=bias is not None, dropout=dropout, half=half)
        return prepare(mask, kernel, bias, device, dtype)


def _needs(attention: Any) -> tuple[int | None, bool, bool]:
    """What the choice of a kernel depends on beside the mask: window, whether scores are capped, whether probabilities are dropped."""
    window, softcap = getattr(attention, "window", None), getattr(attention, "softcap", None)
    return window, softcap is not None, bool(attention.training and getattr(attention, "dropout", 0.0))


class Transformer(Stack):
    """A decoder-only model. Forward takes and returns what Hugging Face users expect, and changes nothing in the model.

    Build it with `txtrain.build_model(config)`.
    """

    accepts_loss_kwargs = True  # transformers.Trainer: it may pass num_items_in_batch

    def __init__(self, config: ModelConfig, embedding: TokenEmbedding, position: Position, blocks: list[nn.Module], final_norm: nn.Module | None) -> None:
        super().__init__(position, blocks, final_norm, causal=True)
        self.config = config
        self.embedding = embedding
        self.dropout = nn.Dropout(config.dropout)
        self.head = LMHead(config.dim, config.vocab_size, config.tie_word_embeddings, config.logit_softcap)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        return_logits: bool = True,
        logits_to_keep: int = 0,
    ) -> ModelOutput:
        """One pass.

        Args:
            input_ids: [B, T], or inputs_embeds: [B, T, D] in its place.
            attention_mask: [B, T], or [B, S] with a cache; 1 for a real token, 0 for padding.
            position_ids: [B, T]; by default 0, 1, 2, ... after what the cache holds, restarting at each document.
            document_ids: [B, T]; tokens attend within their document only. Not with a cache.
            labels: [B, T], as input_ids, -100 where nothing is to be predicted; shifted here: logits at t predict label t + 1.
            past_key_values: what the last call returned; it is updated in place.
            num_items_in_batch: the loss is its sum over the targets divided by this; by default by the number of targets here.
            return_logits: False computes the loss by chunks and never holds all logits.
            logits_to_keep: logits of the last so many positions only; 0: of all. Not with labels.

        Raises:
            ValueError: inputs contradict each other, or exceed the model's learned positions.
        """
        x_BTD = self._embedded(input_ids, inputs_embeds)
        B, T = x_BTD.shape[:2]
        cache = self.new_cache() if past_key_values is None and use_cache else past_key_values
        past = 0 if cache is None else cache.length
        if cache is not None and document_ids is not None:
            raise ValueError("`document_ids` must not be given together with a cache: packed documents are for training.")
        if self.max_positions is not None and past + T > self.max_positions:
            raise ValueError(f"`input_ids` must have at most {self.max_positions - past} positions here, but has {T}: model.max_seq_len is learned.")
        valid_BS = self._valid(attention_mask, cache, B, T)
        positions, distances = self._positions(position_ids, document_ids, cache, past, T, x_BTD.device)
        x_BTD = self.dropout(self.position.add(x_BTD, positions))
        x_BTD = self.run(x_BTD, positions, distances, valid_BS, document_ids, cache)
        if cache is not None:
            cache.length = past + T
        loss = logits = None
        if return_logits:
            logits = self.head(x_BTD[:, -logits_to_keep:], self.embedding.weight_VD)
        if labels is not None:
            loss = self._loss(x_BTD, logits, shifted(labels), num_items_in_batch)
        return ModelOutput(loss=loss, logits=logits, past_key_values=cache, last_hidden_state=x_BTD)

    @property
    def max_positions(self) -> int | None:
        """Positions that the model has vectors for; None: any number."""
        return self.position.max_positions

    def _embedded(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("`input_ids` or `inputs_embeds` must be given, and not both.")
        if inputs_embeds is not None:
            return self.embedding.scaled(inputs_embeds)
        return self.embedding(input_ids)

    def _loss(self, x_BTD: Tensor, logits: Tensor | None, targets: Tensor, n_items: Tensor | int | None) -> Tensor:
        if n_items is None:
            n_items = (targets != -100).sum()
        denominator = torch.as_tensor(n_items, dtype=torch.float32, device=x_BTD.device)
        if logits is not None:
            return cross_entropy(logits, targets, denominator)
        return self.head.loss(x_BTD, self.embedding.weight_VD, targets, denominator)

    @staticmethod
    def _valid(attention_mask: Tensor | None, cache: Cache | None, B: int, T: int) -> Tensor | None:
        """[B, S] True for real tokens, or None where all are; remembered in the cache."""
        past = 0 if cache is None else cache.length
        known = None if cache is None else cache.valid_BS
        if attention_mask is None and known is None:
            return None
        device = attention_mask.device if attention_mask is not None else known.device  # type: ignore[union-attr]
        if attention_mask is None:
            attention_mask = torch.ones(B, T, dtype=torch.bool, device=device)
        if attention_mask.shape[1] not in (T, past + T):
            raise ValueError(f"`attention_mask` must have {T} columns, or {past + T} with those of the cache, but has {attention_mask.shape[1]} instead.")
        valid = attention_mask.bool()
        if valid.shape[1] != past + T:
            valid = append(torch.ones(1, past, dtype=torch.bool, device=device) if known is None else known, valid)
        if device.type == "cpu" and not torch.compiler.is_compiling() and bool(valid.all()):
            return None  # collators often send a mask of ones; on a GPU the look would wait for the device
        if cache is not None:
            cache.valid_BS = valid
        return valid

    @staticmethod
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
            raise ValueError("`position_ids` must be given again: this cache was filled with explicit ones.")
        return index_1S[:, past:], index_1S

"""Sentinels replace spans of the input, and the target holds the spans (T5: Raffel et al. 2019, 1910.10683).

    text     Thank you for inviting me to your party last week
    input    Thank you <0> me to your party <1> week </s>
    target   <0> for inviting <1> last </s>
"""

# B batch, L tokens of the text, S spans

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from txtrain.data.samples.draws import Draws
from txtrain.data.samples.order import Indices
from txtrain.data.samples.packed import PackedSamples
from txtrain.data.samples.rows import Mapped, Rows
from txtrain.data.samples.text import TokenisedText
from txtrain.data.tokenizer.tokenizer import Tokenizer
from txtrain.objectives.base import Batch, Objective, Shown, Terms, n_targets
from txtrain.objectives.continuations import encode, said
from txtrain.objectives.spans import Lengths, sentinel
from txtrain.run_config import RunConfig


class SpanCorruption(Objective):
    """Cross-entropy of the target, sentinels and end token included, in nats per token."""

    def __init__(self, density: float = 0.15, mean_length: float = 3.0, n_sentinels: int = 100) -> None:
        self.density, self.mean_length = density, mean_length
        self.names = tuple(sentinel(k) for k in range(n_sentinels))
        self.special_tokens = self.names[::-1]  # the first sentinel is the last token of the vocabulary, as in T5

    def samples(self, text: TokenisedText) -> Rows:
        lengths = Lengths.fitting(text.seq_len, self.density, self.mean_length)
        assert lengths is not None  # the config was checked
        rows = PackedSamples(text.tokens, lengths.n_tokens, text.cross_document_attention, overlap=0)
        sentinels = np.array([text.words.id_of(name) for name in self.names[: lengths.n_spans]])
        return Mapped(rows, Corruption(lengths, sentinels, text.words.eos_id))

    def denominators(self, batch: Batch) -> Terms:
        return {"loss": n_targets(batch["labels"])}

    def __call__(self, model: Callable[..., Any], batch: Batch, denominators: Terms) -> Terms:
        output = model(
            input_ids=batch["input_ids"], document_ids=batch.get("document_ids"),
            decoder_document_ids=batch.get("decoder_document_ids"), labels=batch["labels"],
            num_items_in_batch=denominators["loss"], return_logits=False
        )
        return {"loss": output.loss}

    def show(self, module: Any, data: Any, config: RunConfig, check: Callable[[], None]) -> list[Shown]:
        """Texts with gaps (config.sample's prompts, or validation documents), up to the last gap that the model fills.
        Its fillings are between « and »."""
        tokenizer, wanted = data.tokenizer, config.sample
        if not wanted.max_new_tokens:
            return []
        gaps = {tokenizer.id_of(name) for name in self.names}
        prompts = [encode(tokenizer, prompt, answers=True) for prompt in wanted.prompts]
        sources = prompts or [_first_document(batch) for batch in data.examples(wanted.n, 1)]
        return [Shown(_filled(ids, said(module, tokenizer, ids, config, check), gaps, tokenizer)) for ids in sources]


class Corruption:
    """From texts [B, L] to input_ids and labels, both of fixed length.

    Tokens keep the number of their document; a sentinel has that of the first token it replaces.
    """

    def __init__(self, lengths: Lengths, sentinels_S: Indices, eos_id: int) -> None:
        self.lengths, self.sentinels_S, self.eos_id = lengths, sentinels_S, eos_id

    def __call__(self, batch: dict[str, Tensor], draws: Draws) -> dict[str, Tensor]:
        kept_BS, noise_BS = self.spans(draws)
        begin_BS = np.cumsum(kept_BS + noise_BS, axis=1) - noise_BS  # of each dropped span, behind a kept one
        text_BL = batch["input_ids"].numpy()
        sentinels_BS = np.broadcast_to(self.sentinels_S, begin_BS.shape)
        input_ids, labels = self._divided(
            text_BL, begin_BS, noise_BS, kept_BS, sentinels_BS, np.full(len(text_BL), self.eos_id)
        )
        made = {"input_ids": input_ids, "labels": labels}
        if "document_ids" in batch:
            of_BL = batch["document_ids"].numpy()
            of_sentinels_BS = np.take_along_axis(of_BL, begin_BS, axis=1)
            made["document_ids"], made["decoder_document_ids"] = self._divided(
                of_BL, begin_BS, noise_BS, kept_BS, of_sentinels_BS, of_BL[:, -1]
            )
        return made

    def spans(self, draws: Draws) -> tuple[Indices, Indices]:
        """Lengths [B, S] of the kept and of the dropped spans, which alternate; the first is kept."""
        sizes = self.lengths
        kept = _segments(draws, "kept", sizes.n_tokens - sizes.n_noise, sizes.n_spans)
        return kept, _segments(draws, "dropped", sizes.n_noise, sizes.n_spans)

    @staticmethod
    def _divided(
        values_BL: Indices, begin_BS: Indices, noise_BS: Indices, kept_BS: Indices, sentinels_BS: Indices,
        end_B: Indices
    ) -> tuple[Tensor, Tensor]:
        """Kept values, a sentinel after each span; dropped values, a sentinel before each span; both with `end_B`."""
        B, L = values_BL.shape
        is_noise_BL = _within(begin_BS, noise_BS, L)
        rows = np.arange(B)[:, None]
        first_dropped_BL, first_kept_BL = (np.zeros((B, L), dtype=np.bool_) for _ in range(2))
        first_dropped_BL[rows, begin_BS] = True
        first_kept_BL[rows, begin_BS - kept_BS] = True
        at_dropped_BL, at_kept_BL = values_BL.copy(), values_BL.copy()
        at_dropped_BL[rows, begin_BS] = sentinels_BS
        at_kept_BL[rows, begin_BS - kept_BS] = sentinels_BS  # replaces the kept span before it
        source = at_dropped_BL[~is_noise_BL | first_dropped_BL].reshape(B, -1)
        target = at_kept_BL[is_noise_BL | first_kept_BL].reshape(B, -1)
        source, target = (np.concatenate((part, end_B[:, None]), axis=1) for part in (source, target))
        return torch.from_numpy(source), torch.from_numpy(target)


def _segments(draws: Draws, name: str, n_items: int, n_segments: int) -> Indices:
    """[B, n_segments]: lengths of a uniformly random partition of n_items into non-empty segments."""
    inner = np.argsort(draws.uniform(name, n_items - 1), axis=1, kind="stable")[:, : n_segments - 1] + 1
    borders = np.sort(inner, axis=1)
    return np.diff(borders, axis=1, prepend=0, append=n_items)


def _first_document(batch: Batch) -> list[int]:
    """The ids of the first document of a batch of one: training does not attend across documents."""
    (ids,), documents = batch["input_ids"], batch.get("document_ids")
    read: list[int] = (ids if documents is None else ids[documents[0] == documents[0, 0]]).tolist()
    return read


def _filled(ids: Sequence[int], answer: Sequence[int], gaps: Collection[int], tokenizer: Tokenizer) -> str:
    """The text up to the last filled gap, or all of it if none is filled; unfilled gaps keep their sentinels' names."""
    fillings: dict[int, list[int]] = {}
    filling: list[int] = []  # tokens before the first sentinel are ignored
    for token in answer:
        if token in gaps:
            filling = fillings.setdefault(token, [])
        else:
            filling.append(token)
    last = max((i for i, token in enumerate(ids) if token in fillings), default=len(ids) - 1)
    text, begin = "", 0
    for i in (i for i in range(last + 1) if ids[i] in gaps):
        inside = (
            f"«{tokenizer.decode(fillings[ids[i]])}»"
            if ids[i] in fillings else tokenizer.decode([ids[i]], special=True)
        )
        text, begin = text + tokenizer.decode(ids[begin:i]) + inside, i + 1
    return text + tokenizer.decode(ids[begin : last + 1])


def _within(begin_BS: Indices, length_BS: Indices, L: int) -> NDArray[np.bool_]:
    """[B, L]: whether a position is in one of the spans."""
    change = np.zeros((len(begin_BS), L + 1), dtype=np.int64)
    rows = np.arange(len(begin_BS))[:, None]
    change[rows, begin_BS] += 1
    change[rows, begin_BS + length_BS] -= 1
    return np.cumsum(change, axis=1)[:, :-1] > 0

"""What predict writes of each row: a label, a text, a log-probability or an embedding."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from txtrain.config.schema_of_trained import Predict
from txtrain.data.samples.images import ImageSamples
from txtrain.data.samples.labels import frame_of, framed
from txtrain.data.samples.prompts import PromptSamples, problem_of
from txtrain.data.samples.questions import Encoded, Ids, QuestionRows, halves
from txtrain.data.samples.rows import mask_of, padded
from txtrain.data.sources.source import Problem
from txtrain.data.store.split import digest
from txtrain.data.tokenizer.tokenizer import Tokenizer
from txtrain.errors import ConfigError
from txtrain.model.config import ModelConfig, Sampling
from txtrain.model.generation import Decoding, continue_rows
from txtrain.model.transformer import shifted_right
from txtrain.objectives.continuations import end_tokens
from txtrain.objectives.questions import answered, read_by
from txtrain.objectives.rewards import Rewards, jobs_of
from txtrain.training.batches import placed

Row = tuple[str, str]  # what is read, and what follows it, if that is known
_DIGITS = 7  # of a float32


class Maker:
    """Makes the objects of rows. model: set once it is laid over the ranks."""

    model: Any
    rows: Any  # whose number is that of the objects
    known = ""  # identifies the rows

    def __init__(self, config: Predict, what: str, device: torch.device) -> None:
        self.config, self.what, self.device = config, what, device

    @property
    def generates(self) -> bool:
        return self.what == "text"

    def __len__(self) -> int:
        return len(self.rows)

    def told(self) -> str:
        """How many rows are not read whole, as a sentence; nothing if all are."""
        return ""

    def objects(self, index: list[int]) -> list[dict[str, Any]]:
        """Of these rows, without their `index`."""
        batch = placed(self.batch(index), self.device, self.config)
        made: list[dict[str, Any]] = getattr(self, self.what)(index, batch)
        return made

    def batch(self, index: list[int]) -> dict[str, Tensor]:
        raise NotImplementedError

    def label(self, index: list[int], batch: dict[str, Tensor]) -> list[dict[str, Any]]:
        return labelled(self.config.model, self.model(**batch).logits)

    def embedding(self, index: list[int], batch: dict[str, Tensor]) -> list[dict[str, Any]]:
        given, mask = dict(batch), batch.get("attention_mask")
        two = self.config.model.topology == "encoder_decoder"
        if two:  # a forward needs something to write
            given["decoder_input_ids"] = shifted_right(self.config.model, batch["input_ids"][:, :1])
        output = self.model(**given, return_logits=False)
        x_BTD = (output.encoder_last_hidden_state if two else output.last_hidden_state).double()
        real_BT = x_BTD.new_ones(x_BTD.shape[:2]) if mask is None else mask.double()
        if self.config.predict.pooling == "mean":
            pooled = (x_BTD * real_BT[..., None]).sum(1) / real_BT.sum(1, keepdim=True)
        else:
            last = real_BT.long().sum(1) - 1 if self.config.predict.pooling == "last" else real_BT.long().sum(1) * 0
            pooled = x_BTD[torch.arange(len(x_BTD), device=x_BTD.device), last]
        return [{"embedding": [_rounded(v) for v in row]} for row in pooled.tolist()]


class OfImages(Maker):
    def __init__(self, config: Predict, what: str, device: torch.device, rows: ImageSamples) -> None:
        super().__init__(config, what, device)
        self.rows, self.known = rows, str(len(rows))

    def batch(self, index: list[int]) -> dict[str, Tensor]:
        return {"pixel_values": self.rows.batch(np.asarray(index))["pixel_values"]}


class OfClasses(Maker):
    """Labels of texts, or of pairs of them, which are read as in training: within the tokenizer's special tokens."""

    def __init__(
        self, config: Predict, what: str, device: torch.device, rows: Sequence[tuple[str, ...]], tokenizer: Tokenizer
    ) -> None:
        super().__init__(config, what, device)
        self.rows, self.tokenizer = rows, tokenizer
        self.frame = frame_of(tokenizer, len(rows[0]) if rows else 1, config.seq_len)
        self.known = digest(rows, tokenizer.fingerprint)

    def batch(self, index: list[int]) -> dict[str, Tensor]:
        tokenizer = self.tokenizer
        # a text without any token is read as its end
        texts = [[tokenizer.encode(text) or [tokenizer.eos_id] for text in self.rows[i]] for i in index]
        pad_id = tokenizer.padding_id
        return framed(texts, self.frame, self.config.seq_len, pad_id, self.config.model.embedding.n_types)


class OfTexts(Maker):
    def __init__(
        self, config: Predict, what: str, device: torch.device, rows: Sequence[Row], tokenizer: Tokenizer
    ) -> None:
        super().__init__(config, what, device)
        self.rows, self.tokenizer = rows, tokenizer
        self.two_stacks = config.model.topology == "encoder_decoder"
        self.known = digest(rows, tokenizer.fingerprint)
        self._is_cut = False  # whether the newest row is
        limit, n_new = config.seq_len, config.max_new_tokens
        if what == "text" and not self.two_stacks and n_new >= limit:
            allowed = f"below data.seq_len, which holds a prompt and its answer and is {limit}"
            raise ConfigError(f"`max_new_tokens` must be {allowed}, but is {n_new} instead.")

    def told(self) -> str:
        if self.what == "log_probability" and not self.two_stacks:  # in windows, however long a row is
            return ""
        n_cut = 0
        for row in self.rows:
            self._is_cut = False
            self._ids(*row) if self.what == "embedding" else self._encoded(*row)
            n_cut += self._is_cut
        limit = f"data.seq_len={self.config.seq_len}"
        if self.what == "text" and not self.two_stacks:
            limit += f" less max_new_tokens={self.config.max_new_tokens}: their begin is not read"
        return f"{n_cut:,} of {len(self.rows):,} rows are longer than {limit}." if n_cut else ""

    def _cut(self, ids: Ids, kept: slice) -> Ids:
        self._is_cut |= len(ids[kept]) < len(ids)
        return ids[kept]

    def batch(self, index: list[int]) -> dict[str, Tensor]:
        if self.what == "embedding":
            return self._whole([self._ids(*self.rows[i]) for i in index])
        encoded = [self._encoded(*self.rows[i]) for i in index]
        every, seq_len = np.arange(len(encoded)), self.config.seq_len
        return QuestionRows(encoded, every, self.tokenizer, seq_len, self.two_stacks).batch(every)

    def _ids(self, before: str, scored: str) -> Ids:
        """A whole text, cut at its end to data.seq_len; an encoder reads it between its own tokens."""
        tokenizer, limit = self.tokenizer, self.config.seq_len
        begin = [] if tokenizer.bos_id is None or self.two_stacks else [tokenizer.bos_id]
        end = [] if self.config.model.topology == "decoder" else [tokenizer.eos_id]
        ids = tokenizer.encode(before + scored if not self.two_stacks else before)
        whole = [*begin, *self._cut(ids, slice(limit - len(begin) - len(end))), *end]
        return whole or [tokenizer.eos_id]

    def _whole(self, rows: Sequence[Ids]) -> dict[str, Tensor]:
        longest = -(-max(map(len, rows)) // 8) * 8
        longest = min(longest, max(self.config.seq_len, *map(len, rows)))
        ids = padded(rows, self.tokenizer.padding_id, longest)
        return {"input_ids": ids, "attention_mask": mask_of(rows, longest)}

    def _encoded(self, before: str, scored: str) -> Encoded:
        """To generate: what is read. Else what is read, and what is predicted, by windows if it is long."""
        tokenizer, limit = self.tokenizer, self.config.seq_len
        if self.what == "text":
            if self.two_stacks:
                read = self._cut(tokenizer.encode(before), slice(limit - 1))
                return Encoded((([*read, tokenizer.eos_id], []),), (0,), None)
            begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
            ids = [*begin, *tokenizer.encode(before)] or [tokenizer.eos_id]
            read = self._cut(ids, slice(self.config.max_new_tokens - limit, None))
            return Encoded(((read, []),), (0,), None)
        if self.two_stacks:
            read = [*self._cut(tokenizer.encode(before), slice(limit - 1)), tokenizer.eos_id]
            target = self._cut([*tokenizer.encode(scored), tokenizer.eos_id], slice(limit))
            return Encoded(((read, target),), (0,), None)
        begin = [tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id]
        first, whole = halves(tokenizer, before, scored)
        ids = [*begin, *whole]
        n_read = 1 + len(first) if scored else 1
        windows: list[tuple[Ids, Ids]] = []
        at = n_read  # the next token to predict
        while at < len(ids) or not windows:
            start = max(0, min(at - 1, len(ids) - limit) if at > limit - 1 else 0)
            end = min(start + limit, len(ids))
            windows.append((ids[start:at], ids[at:end]))
            at = max(end, at + 1)
        return Encoded(tuple(windows), (0,) * len(windows), None)

    def log_probability(self, index: list[int], batch: dict[str, Tensor]) -> list[dict[str, Any]]:
        given = read_by(self.model, batch, self.two_stacks)
        found = self.model(**given, return_logits=False, return_log_probs=True).log_probs.double()
        shape = batch["labels"].shape
        sums, n = found.view(shape).sum((1, 2)), (batch["labels"] != -100).sum((1, 2))
        return [
            {"log_probability": _rounded(total), "n_tokens": count}
            for total, count in zip(sums.tolist(), n.tolist(), strict=True)
        ]

    def text(self, index: list[int], batch: dict[str, Tensor]) -> list[dict[str, Any]]:
        config = self.config

        def make(rows: dict[str, Tensor], seed: int | None = None) -> list[str]:
            return answered(
                self.model, rows, self.tokenizer, self.two_stacks, config.max_new_tokens, config.stop, seed=seed,
                temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, min_p=config.min_p,
            )

        if not config.temperature:
            return [{"text": text} for text in make(batch)]
        made: list[str] = []
        for i, row in enumerate(index):  # alone: its random numbers are a function of the seed and its number
            seed = int.from_bytes(hashlib.blake2b(f"{config.seed}/{row}".encode(), digest_size=7).digest(), "little")
            made += make({name: value[i : i + 1] for name, value in batch.items()}, seed)
        return [{"text": text} for text in made]


class OfProblems(Maker):
    """n samples of each problem with their rewards: row i is sample i % n of problem i // n."""

    def __init__(
        self, config: Predict, what: str, device: torch.device, problems: Sequence[Problem], tokenizer: Tokenizer
    ) -> None:
        super().__init__(config, what, device)
        longest = config.seq_len - config.max_new_tokens
        self.rows, self.tokenizer = PromptSamples(problems, tokenizer, longest), tokenizer
        if not len(self.rows):
            allowed = f"a problem of at most {longest} tokens, which is data.seq_len less max_new_tokens"
            raise ConfigError(f"`data` must have {allowed}, but has none.")
        self.rewards = Rewards(config.reward)
        self.how = Sampling(
            max_new_tokens=config.max_new_tokens, temperature=config.temperature, top_k=config.top_k,
            top_p=config.top_p, min_p=config.min_p or None, seed=config.seed,
        )
        self.known = digest([*map(dict, problems)], tokenizer.fingerprint, longest)

    def __len__(self) -> int:
        return len(self.rows) * self.config.n

    def objects(self, index: list[int]) -> list[dict[str, Any]]:
        of = [i // self.config.n for i in index]
        batch = self.rows.batch(np.asarray(of))
        asked = [problem_of(text) for text in batch["problem"]]
        job = Decoding(self.how, end_tokens(self.config.model, self.tokenizer), device=self.device)
        written = continue_rows(self.model, [self.rows.ids[i] for i in of], job, index)
        jobs = jobs_of(asked, written, self.tokenizer)
        totals = map(self.rewards.total, self.rewards(jobs))
        return [
            {**{name: value for name, value in job.sample.items() if name not in ("prompt", "n_tokens")},
             "text": job.completion, "reward": total}
            for job, total in zip(jobs, totals, strict=True)
        ]


def labelled(model: ModelConfig, logits_BC: Tensor) -> list[dict[str, Any]]:
    """The likeliest class, or all classes above one half, and the probability of each; or the numbers. A class is told
    by its name, if it has one."""
    head, logits_BC = model.head, logits_BC.double()
    if head.kind == "regression":
        numbers = [[_rounded(value) for value in row] for row in logits_BC.tolist()]
        return [{"label": row if len(row) > 1 else row[0]} for row in numbers]
    said: Sequence[Any] = head.label_names or range(logits_BC.shape[-1])
    found = []
    for row in (logits_BC.softmax(-1) if head.kind == "single" else logits_BC.sigmoid()).tolist():
        best = said[max(range(len(row)), key=row.__getitem__)]
        above = [name for name, p in zip(said, row, strict=True) if p > 0.5]
        probabilities = {str(name): _rounded(p) for name, p in zip(said, row, strict=True)}
        found.append({"label": best if head.kind == "single" else above, "probabilities": probabilities})
    return found


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else value

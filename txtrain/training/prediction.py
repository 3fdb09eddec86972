"""A trained model's output for each row of a file: labels, texts, log-probabilities or embeddings, in its order."""

# B rows, C windows of a text, T tokens, D model size

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from txtrain.checkpoint.load import open_weights
from txtrain.config.schema import Predict
from txtrain.data.samples.images import ImageSamples
from txtrain.data.samples.labels import frame_of, framed
from txtrain.data.samples.order import Indices
from txtrain.data.samples.prompts import PromptSamples, problem_of
from txtrain.data.samples.questions import Encoded, Ids, QuestionRows
from txtrain.data.sources.files import chunks_of
from txtrain.data.sources.source import Problem, as_named, build_source, method_of
from txtrain.data.tokenizer.load import load_tokenizer
from txtrain.data.tokenizer.tokenizer import Tokenizer
from txtrain.errors import ConfigError
from txtrain.ground import files
from txtrain.ground.convert import plain
from txtrain.hf.pieces import Source
from txtrain.model.config import ModelConfig, Sampling
from txtrain.model.generation import Decoding, continue_rows
from txtrain.model.transformer import shifted_right
from txtrain.objectives.questions import answered
from txtrain.objectives.rewards import Rewards, jobs_of
from txtrain.parallel.one_process import OneProcess
from txtrain.training.evaluation import Tick, check_out, ranks_of, shares_of

Row = tuple[str, str]  # what is read, and what follows it, if that is known
_DIGITS = 7  # of a float32


def what_of(config: Predict) -> str:
    """The kind of output.

    Raises:
        ConfigError: the model or the data have no such output.
    """
    model, asked, kind = config.model, config.predict.what, config.data.sample_kind
    pools, writes = model.head.pools, model.head.writes and model.topology != "encoder"
    if kind not in ("text", "pairs", "labels", "cloze", "questions", "images", "problems"):
        raise _no_rows(config)
    if kind == "problems" and (asked not in ("auto", "text") or model.topology != "decoder" or not writes):
        what = f"auto or text, of a decoder, with data={config.data.type}"
        raise ConfigError(f"`predict.what` must be {what}, but is {asked} with topology {model.topology} instead.")
    what = asked if asked != "auto" else "label" if pools else "text" if writes else "embedding"
    allowed = ["embedding", *(["label"] if pools else []), *(["text", "log_probability"] if writes else [])]
    if what not in allowed:
        raise ConfigError(
            f"`predict.what` must be auto or one of {', '.join(allowed)} for a model of topology {model.topology} with "
            f"model/head={model.head.type}, but is {what} instead."
        )
    return what


def _no_rows(config: Predict) -> ConfigError:
    rows = "rows of text, pairs, labels, questions with one answer, problems or images"
    return ConfigError(f"`data` must be {rows}, but is {config.data.type} instead.")


def run(config: Predict, tick: Tick = lambda done, n: None) -> int:
    """Write `out`, beginning where an interrupted run of the same command has ended. Returns the number of rows.

    Raises:
        ConfigError: the data, the weights or `out` do not allow it.
    """
    assert config.checkpoint is not None
    assert config.out is not None
    out, what = check_out(config.out, ".jsonl"), what_of(config)
    if out.exists():
        raise ConfigError(f"`out` must be a new file, but {config.out!r} exists: remove it, or name another.")
    parallel = ranks_of(config)
    with parallel.started():
        device = parallel.device()
        source = parallel.together(lambda: _opened(config, parallel))
        maker = parallel.together(lambda: _maker(config, what, device))
        file = parallel.first_only(lambda: PartFile(out, _identity(config, what, maker)))
        step = config.micro_batch_size * parallel.size
        begin = parallel.first(lambda: file.begin(step) if file else 0)
        maker.model = parallel.lay_read_only(source, device)
        source.close()
        for shares in shares_of(len(maker), config.micro_batch_size, parallel.size, begin):
            with torch.no_grad(), parallel.autocast(device):
                made = _of_shares(maker, parallel, shares)
            told = [line for lines in parallel.gathered(made) for line in lines]
            if file is not None:
                file.write(told)
            tick(begin := begin + len(told), len(maker))
        parallel.first_only(lambda: file.finish() if file else None)
    return len(maker)


def _opened(config: Predict, parallel: OneProcess) -> Source:
    assert config.checkpoint is not None
    source = open_weights(config.checkpoint, "checkpoint", not config.allow_nonfinite, *parallel.world[:2])
    parallel.check_read(source.model.config, "checkpoint")
    return source


def _of_shares(maker: Maker, parallel: OneProcess, shares: Sequence[Indices]) -> list[str]:
    mine, width = parallel.rank, len(shares[0])
    together = maker.generates and not parallel.forwards_alone  # all ranks generate the same texts at the same time
    found: list[dict[str, Any]] = []
    for rank in range(parallel.size) if together else [mine]:
        filled = np.concatenate([shares[rank], np.full(width - len(shares[rank]), shares[0][0])])
        made = maker.objects(filled.tolist())
        found = made if rank == mine else found
    rows = zip(shares[mine].tolist(), found, strict=False)  # without what only fills the batch
    return [json.dumps({"index": i, **one}, ensure_ascii=False) for i, one in rows]


# ----------------------------------------------------------------------------------------------------------------- file


class PartFile:
    """`OUT.part`, which becomes OUT once it is whole; beside it `OUT.part.id`, of the command that writes it."""

    def __init__(self, out: Path, identity: str) -> None:
        self.out = out
        self.part, self.id = (out.with_name(f"{out.name}.part{end}") for end in ("", ".id"))
        if self.part.exists() and (not self.id.exists() or self.id.read_text(encoding="utf-8") != identity):
            raise ConfigError(
                f"`out`: {self.part} is of another checkpoint, other data or other keys: give its own, or remove it."
            )
        with files.writing(out.parent, "out"):
            out.parent.mkdir(parents=True, exist_ok=True)
            files.write(self.id, identity)
        self._file: Any = None

    def begin(self, step: int) -> int:
        """Keep whole steps of rows; returns their number, where to go on."""
        raw = self.part.read_bytes() if self.part.exists() else b""
        lines = raw.split(b"\n")[:-1]
        kept = lines[: len(lines) // step * step]
        self._file = self.part.open("r+b" if raw else "wb")
        self._file.truncate(sum(len(line) + 1 for line in kept))
        self._file.seek(0, 2)
        return len(kept)

    def write(self, lines: Sequence[str]) -> None:
        with files.writing(self.out.parent, "out"):
            self._file.write("".join(f"{line}\n" for line in lines).encode())
            self._file.flush()

    def finish(self) -> None:
        with files.writing(self.out.parent, "out"):
            self._file.close()
            files.sync(self.part)
            self.part.replace(self.out)
            self.id.unlink()


def _identity(config: Predict, what: str, maker: Maker) -> str:
    """Of all that decides the rows; the strategy and the number of processes do not."""
    generation = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "stop", "seed", "n", "reward")
    told = {key: plain(getattr(config, key)) for key in ("checkpoint", "data", "model", "predict", *generation)}
    return hashlib.sha256(json.dumps([told, what, maker.known, config.trainer.precision]).encode()).hexdigest()


# ----------------------------------------------------------------------------------------------------------------- rows


def _maker(config: Predict, what: str, device: torch.device) -> Maker:
    config = as_named(config)
    source = build_source(config)
    method = method_of(source)
    if method == "images":
        embedding, every = config.model.embedding, source.images("train")
        if config.data.mean is None or config.data.std is None:
            raise ConfigError("`data.mean` and `data.std` must be given: those with which the model was trained.")
        rows = ImageSamples(every, np.arange(len(every.labels)), embedding.image_size, embedding.n_channels)
        rows.normalised(config.data.mean, config.data.std)
        return OfImages(config, what, device, rows)
    if method == "documents":
        texts: list[Row] = [("".join(chunks_of(text)), "") for text in source.documents("train")]
    elif method == "pairs":
        texts = list(source.pairs("train"))
    elif method == "questions":
        texts = [question.options[0] for question in source.questions("train")]
    elif method == "problems":
        texts = []
    elif method == "labelled":
        texts = [(first, "".join(second)) for first, *second in (row.texts for row in source.labelled("train"))]
    else:
        raise _no_rows(config)
    if config.data.tokenizer in (None, "train"):
        raise ConfigError("`data.tokenizer` must be given: the model's.")
    tokenizer = load_tokenizer(config.data.tokenizer)
    if method == "problems":
        return OfProblems(config, what, device, [*source.problems("train")], tokenizer)
    if what == "label":
        of_pairs = method == "pairs" or (method == "labelled" and len(source.texts) > 1)
        parts = texts if of_pairs else [(before + scored,) for before, scored in texts]
        return OfClasses(config, what, device, parts, tokenizer.framed(config.model.topology))
    return OfTexts(config, what, device, texts, tokenizer)


class Maker:
    """Makes the objects of rows. model: set once it is laid over the ranks."""

    model: Any
    known = ""  # identifies the rows

    def __init__(self, config: Predict, what: str, device: torch.device) -> None:
        self.config, self.what, self.device = config, what, device

    @property
    def generates(self) -> bool:
        return self.what == "text"

    def __len__(self) -> int:
        raise NotImplementedError

    def objects(self, index: list[int]) -> list[dict[str, Any]]:
        """Of these rows, without their `index`."""
        batch = {name: self._placed(value) for name, value in self.batch(index).items()}
        made: list[dict[str, Any]] = {
            "label": self.labels, "embedding": self.embeddings, "text": self.texts, "log_probability": self.log_probs
        }[self.what](index, batch)
        return made

    def _placed(self, value: Tensor) -> Tensor:
        halved = value.is_floating_point() and self.config.trainer.precision == "bf16-true"
        return value.to(self.device, torch.bfloat16 if halved else None)

    def batch(self, index: list[int]) -> dict[str, Tensor]:
        raise NotImplementedError

    def labels(self, index: list[int], batch: dict[str, Tensor]) -> list[dict[str, Any]]:
        return labelled(self.config.model, self.model(**batch).logits)

    def embeddings(self, index: list[int], batch: dict[str, Tensor]) -> list[dict[str, Any]]:
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

    def texts(self, index: list[int], batch: dict[str, Tensor]) -> list[dict[str, Any]]:
        raise NotImplementedError

    def log_probs(self, index: list[int], batch: dict[str, Tensor]) -> list[dict[str, Any]]:
        raise NotImplementedError


class OfImages(Maker):
    def __init__(self, config: Predict, what: str, device: torch.device, rows: ImageSamples) -> None:
        super().__init__(config, what, device)
        self.rows, self.known = rows, str(len(rows))

    def __len__(self) -> int:
        return len(self.rows)

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
        self.known = hashlib.sha256(json.dumps([rows, tokenizer.fingerprint]).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, index: list[int]) -> dict[str, Tensor]:
        tokenizer = self.tokenizer
        # a text without any token is read as its end
        texts = [[tokenizer.encode(text) or [tokenizer.eos_id] for text in self.rows[i]] for i in index]
        pad_id = tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id
        return framed(texts, self.frame, self.config.seq_len, pad_id, self.config.model.embedding.n_types)


class OfTexts(Maker):
    def __init__(
        self, config: Predict, what: str, device: torch.device, rows: Sequence[Row], tokenizer: Tokenizer
    ) -> None:
        super().__init__(config, what, device)
        self.rows, self.tokenizer = rows, tokenizer
        self.two_stacks = config.model.topology == "encoder_decoder"
        self.known = hashlib.sha256(json.dumps([rows, tokenizer.fingerprint]).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, index: list[int]) -> dict[str, Tensor]:
        if self.what == "embedding":
            return self._whole([self._ids(*self.rows[i]) for i in index])
        encoded = [self._encoded(*self.rows[i]) for i in index]
        return QuestionRows(encoded, np.arange(len(encoded)), self.tokenizer, self.two_stacks).batch(
            np.arange(len(encoded))
        )

    def _ids(self, before: str, scored: str) -> Ids:
        """A whole text, cut at its end to data.seq_len; an encoder reads it between its own tokens."""
        tokenizer, limit = self.tokenizer, self.config.seq_len
        begin = [] if tokenizer.bos_id is None or self.two_stacks else [tokenizer.bos_id]
        end = [] if self.config.model.topology == "decoder" else [tokenizer.eos_id]
        ids = tokenizer.encode(before + scored if not self.two_stacks else before)
        whole = [*begin, *ids[: limit - len(begin) - len(end)], *end]
        return whole or [tokenizer.eos_id]

    def _whole(self, rows: Sequence[Ids]) -> dict[str, Tensor]:
        longest = -(-max(map(len, rows)) // 8) * 8
        pad = self.tokenizer.eos_id if self.tokenizer.pad_id is None else self.tokenizer.pad_id
        longest = min(longest, max(self.config.seq_len, *map(len, rows)))
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": mask}

    def _encoded(self, before: str, scored: str) -> Encoded:
        """To generate: what is read. Else what is read, and what is predicted, by windows if it is long."""
        tokenizer, limit = self.tokenizer, self.config.seq_len
        if self.what == "text":
            room = limit - 1 if self.two_stacks else max(limit - self.config.max_new_tokens, 1)
            if self.two_stacks:
                return Encoded((([*tokenizer.encode(before)[:room], tokenizer.eos_id], []),), (0,), None)
            begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
            ids = [*begin, *tokenizer.encode(before)] or [tokenizer.eos_id]
            return Encoded(((ids[-room:], []),), (0,), None)
        if self.two_stacks:
            read = [*tokenizer.encode(before)[: limit - 1], tokenizer.eos_id]
            target = [*tokenizer.encode(scored), tokenizer.eos_id][:limit]
            return Encoded(((read, target),), (0,), None)
        begin = [tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id]
        first = tokenizer.encode(before) if scored else []
        ids = [*begin, *tokenizer.encode(before + scored)]
        n_read = 1 + len(first)
        windows: list[tuple[Ids, Ids]] = []
        at = n_read  # the next token to predict
        while at < len(ids) or not windows:
            start = max(0, min(at - 1, len(ids) - limit) if at > limit - 1 else 0)
            end = min(start + limit, len(ids))
            windows.append((ids[start:at], ids[at:end]))
            at = max(end, at + 1)
        return Encoded(tuple(windows), (0,) * len(windows), None)

    def log_probs(self, index: list[int], batch: dict[str, Tensor]) -> list[dict[str, Any]]:
        names = ("input_ids", "labels", *(["attention_mask"] if self.two_stacks else []))
        flat = {name: batch[name].flatten(0, 1) for name in names}
        found = self.model(**flat, return_logits=False, return_log_probs=True).log_probs.double()
        shape = batch["labels"].shape
        sums, n = found.view(shape).sum((1, 2)), (batch["labels"] != -100).sum((1, 2))
        return [
            {"log_probability": _rounded(total), "n_tokens": count}
            for total, count in zip(sums.tolist(), n.tolist(), strict=True)
        ]

    def texts(self, index: list[int], batch: dict[str, Tensor]) -> list[dict[str, Any]]:
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
        told = [[*map(dict, problems)], tokenizer.fingerprint, longest]
        self.known = hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.rows) * self.config.n

    def objects(self, index: list[int]) -> list[dict[str, Any]]:
        of = [i // self.config.n for i in index]
        batch = self.rows.batch(np.asarray(of))
        asked = [problem_of(text) for text in batch["problem"]]
        job = Decoding(self.how, (self.tokenizer.eos_id,), device=self.device)
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

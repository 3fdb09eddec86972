"""A teacher's distributions, written ahead of time beside the tokens of a prepared folder."""

from __future__ import annotations

import dataclasses as dc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from txtrain.config.schema import Prepare
from txtrain.data.base_config import DataConfig
from txtrain.data.config import MemmapConfig
from txtrain.data.prepare import prepare
from txtrain.data.samples.draws import Draws
from txtrain.data.samples.taught import DONE, STATE, Taught, arrays, check_taught
from txtrain.data.sources.source import SPLITS, Split, build_source
from txtrain.ground import files
from txtrain.ground.plain_files import check_keys, read_json
from txtrain.hf.pieces import Source
from txtrain.model.head.distillation import Soft, TopK
from txtrain.model.trace.tape import CHUNK_ELEMENTS
from txtrain.objectives.base import IGNORED
from txtrain.objectives.distill import Distill
from txtrain.parallel.one_process import OneProcess
from txtrain.training.models_read import check_tokenizers, check_vocabularies, models_read

_EVERY = 10.0  # seconds between two saved states


def teach(config: Prepare, folder: Path) -> None:
    """Write the teacher's likeliest tokens for every token of the folder; a second start goes on.

    Raises:
        ConfigError: the teacher cannot be read, has another vocabulary, or the folder holds another one's.
    """
    source, parallel = teacher_of(config), OneProcess(config)
    how = config.objective.taught(config, source.identity())
    if (folder / DONE).is_file():
        check_taught(folder, how)
        return
    shared = {f.name: getattr(config.data, f.name) for f in dc.fields(DataConfig)}
    data = MemmapConfig(**{**shared, "type": "memmap", "tokenizer": None}, path=str(folder))
    of_folder = dc.replace(config, data=data)
    objective = Distill(top_k=how.top_k, temperature=how.temperature)
    made = prepare(build_source(of_folder), of_folder, objective)
    check_tokenizers(config, made.tokenizer)
    model = parallel.lay_read_only(source, parallel.device())
    rows = {"train": made.train, "validation": made.validation}
    state = _State(folder, how)
    for split in SPLITS:
        _write(objective, model, rows[split], split, state, config)
    files.write(folder / DONE, json.dumps(how.about(), indent=2) + "\n")
    (folder / STATE).unlink()


def teacher_of(config: Prepare) -> Source:
    """The teacher's weights.

    Raises:
        ConfigError: they cannot be read, or are of another vocabulary.
    """
    source = models_read(config, OneProcess(config))["teacher"]
    check_vocabularies(config, {"teacher": source})
    return source


class _State:
    """How many rows of each split are safely written."""

    def __init__(self, folder: Path, how: Taught) -> None:
        self.folder, self.how, self.saved = folder, how, time.monotonic()
        self.done: dict[str, int] = dict.fromkeys(SPLITS, 0)
        if (folder / STATE).is_file():
            check_taught(folder, how, STATE)
            found = read_json(folder / STATE)
            check_keys(found, str(folder / STATE), {"done": dict[str, int]})
            self.done |= {split: max(0, found["done"].get(split, 0)) for split in SPLITS}

    def save(self, *mapped: Any) -> None:
        for one in mapped:
            one.flush()
        files.write(self.folder / STATE, json.dumps({**self.how.about(), "done": self.done}) + "\n")
        self.saved = time.monotonic()


def _write(
    objective: Distill, model: Callable[..., Any], rows: Any, split: Split, state: _State, config: Prepare
) -> None:
    """The distributions for the targets of each row, at their places in the stream of tokens."""
    tokens, size, n = rows.tokens, config.micro_batch_size, len(rows)
    exists = (state.folder / f"teacher-{split}.log_probs").is_file() and (state.folder / STATE).is_file()
    mode = "r+" if exists else "w+"
    given = state.folder, split, len(tokens), state.how.top_k, config.model.vocab_size
    ids, log_probs = mapped = arrays(*given, mode)
    began, first = time.monotonic(), state.done[split]
    for start in range(first, n, size):
        index = np.arange(start, min(start + size, n))
        batch = rows.batch(index, Draws(0, split, index))
        places, found = rows.places(index), _likeliest(objective, model, batch, config)
        targets = (batch["labels"][:, 1:] != IGNORED).numpy()
        here = places[:, 1:][targets]
        values = [x.reshape(*places.shape, *x.shape[1:])[:, :-1][torch.from_numpy(targets)].cpu() for x in found]
        ids[here] = values[0].numpy()
        log_probs[here] = torch.cat((values[1], values[2][:, None]), 1).float().numpy()
        state.done[split] = int(index[-1]) + 1
        if time.monotonic() - state.saved > _EVERY:
            state.save(*mapped)
    state.save(*mapped)
    seconds = time.monotonic() - began
    print(f"the teacher has read {n - first:,} rows ({split}) in {seconds:.1f} s", file=sys.stderr)


def _likeliest(
    objective: Distill, model: Callable[..., Any], batch: dict[str, torch.Tensor], config: Prepare
) -> list[torch.Tensor]:
    """Ids [N, K], log-probabilities [N, K] and of all others [N], for the token behind each position."""
    device = next(iter(model.parameters())).device  # type: ignore[attr-defined]
    found: list[TopK] = []

    def consume(soft_of: Callable[[slice], Soft]) -> None:
        size = max(1, CHUNK_ELEMENTS // config.model.vocab_size)
        for start in range(0, batch["labels"].numel(), size):
            soft = soft_of(slice(start, start + size))
            assert isinstance(soft, TopK)
            found.append(soft)

    with torch.autocast(device.type, torch.bfloat16, enabled=config.trainer.precision == "bf16-mixed"):
        objective.read(model, {name: value.to(device) for name, value in batch.items()}, consume)
    return [torch.cat(parts) for parts in zip(*((one.ids, one.log_p, one.log_tail) for one in found), strict=True)]

"""A trained model's output for each row of a file: labels, texts, log-probabilities or embeddings, in its order."""

# B rows, C windows of a text, T tokens, D model size

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from txtrain.config.schema_of_trained import Predict
from txtrain.data.samples.images import ImageSamples
from txtrain.data.samples.order import Indices
from txtrain.data.sources.files import chunks_of
from txtrain.data.sources.source import as_named, build_source, method_of
from txtrain.data.store.split import digest
from txtrain.data.tokenizer.load import load_tokenizer
from txtrain.errors import ConfigError
from txtrain.ground.convert import plain
from txtrain.hf.digest import sha256_of
from txtrain.parallel.one_process import OneProcess
from txtrain.training.evaluation import Tick, check_out, filled, ranks_of, shares_of
from txtrain.training.opened import trained_weights
from txtrain.training.part_file import PartFile
from txtrain.training.predicted import Maker, OfClasses, OfImages, OfProblems, OfTexts, Row


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
        source, weights = trained_weights(config, parallel, sha256_of)
        maker = parallel.together(lambda: _maker(config, what, device))
        file = parallel.first_only(lambda: PartFile(out, _identity(config, what, maker, weights)))
        step = config.micro_batch_size * parallel.size
        if file is not None and (said := maker.told()):
            print(f"txtrain: {said}", file=sys.stderr)
        begin = parallel.first(lambda: file.begin(step) if file else 0)
        maker.model = parallel.lay_read_only(source, device)
        source.close()
        for shares in shares_of(len(maker), config.micro_batch_size, parallel.size, begin):
            with torch.no_grad(), parallel.autocast(device):
                made = _of_shares(maker, parallel, shares)
            told = [line for lines in parallel.gathered(made) for line in lines]
            # A full disk ends all ranks, with one message.
            parallel.first_only(partial(file.write, told) if file is not None else lambda: None)
            tick(begin := begin + len(told), len(maker))
        parallel.first_only(lambda: file.finish() if file else None)
    return len(maker)


def _of_shares(maker: Maker, parallel: OneProcess, shares: Sequence[Indices]) -> list[str]:
    mine = parallel.rank
    together = maker.generates and not parallel.forwards_alone  # all ranks generate the same texts at the same time
    found: list[dict[str, Any]] = []
    for rank in range(parallel.size) if together else [mine]:
        made = maker.objects(filled(shares, rank))
        found = made if rank == mine else found
    rows = zip(shares[mine].tolist(), found, strict=False)  # without what only fills the batch
    return [json.dumps({"index": i, **one}, ensure_ascii=False) for i, one in rows]


def _identity(config: Predict, what: str, maker: Maker, weights: str) -> str:
    """Of all that decides the rows; the strategy and the number of processes do not. weights: their hash, since a run
    that goes on has others under the same path."""
    generation = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "stop", "seed", "n", "reward")
    named = ("weights", "data", "model", "predict", *generation)
    told = {key: plain(getattr(config, key)) for key in named}
    return digest(told, weights, what, maker.known, config.trainer.precision)


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

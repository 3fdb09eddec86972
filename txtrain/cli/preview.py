"""`txtrain preview`: the first samples of a run, as its model will see them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor

from txtrain.config.composed import Composed
from txtrain.config.schema import Preview, Train
from txtrain.data.sources.source import Split
from txtrain.data.tokenizer.tokenizer import Tokenizer
from txtrain.errors import ConfigError, visible
from txtrain.model.config import ModelConfig
from txtrain.model.transformer import shifted_right
from txtrain.objectives.base import IGNORED
from txtrain.objectives.classification import said
from txtrain.training.data_module import DataModule

Sample = Mapping[str, Tensor]
Pieces = Callable[[int], str]

_SHADES = " .:-=+*#%@"
_COLUMNS = 56  # characters that an image is wide, at most
_STYLES = {"trained": "bold green", "hidden": "bold red", "border": "bold yellow", "read": "dim"}


def run_preview(job: Composed) -> int:
    """Print preview.n samples.

    Raises:
        ConfigError: as `train`, if the data are wrong; samples are neither tokens nor images; or images as JSON.
    """
    config: Preview = job.config
    wanted = config.preview
    split: Split = "train" if wanted.split == "train" else "validation"
    data = DataModule(config)
    batches = data.first(None if wanted.n == "all" else wanted.n, split)
    batch, sources = next(batches)
    model = data.config.model  # with the classes of the data
    if "input_ids" not in batch and "pixel_values" not in batch:
        raise ConfigError(f"`data`: samples must have input_ids or pixel_values, but have {', '.join(batch)}.")
    if wanted.format == "json" and "input_ids" not in batch:
        raise ConfigError("`preview.format` must be text for images, but is json instead.")
    batches = itertools.chain([(batch, sources)], batches)
    if wanted.format == "json":
        for batch, sources in batches:
            for i, numbers in enumerate(sources):
                sample = {name: value[i] for name, value in batch.items()}
                whole = [] if data.pairs else [as_json(sample, numbers, model, of_labels(data.config))]
                for made in pairs_as_json(sample, numbers) if data.pairs else whole:
                    print(json.dumps(made))
        return 0
    console = Console(highlight=False)
    coloured = console.color_system is not None and not console.no_color
    if data.fallback:
        console.print(visible(f"STAND-IN DATA: {data.fallback}."), style="bold", markup=False)
    writer = Writer(pieces_of(data.tokenizer), model.topology, coloured, of_labels(data.config), data.pairs)
    said = f"{data.source}; {split}, objective={config.objective.type}. {writer.legend(batch)}"
    console.print(visible(said), markup=False)
    for batch, _ in batches:
        for i in range(len(batch["sample_index"])):
            for line in writer.lines({name: value[i] for name, value in batch.items()}):
                console.print(line, soft_wrap=not console.is_terminal)
    return 0


def of_labels(config: Train) -> Callable[[Tensor], str] | None:
    """A sample's label in words, where it has one for all of its tokens."""
    if not config.objective.one_result:
        return None
    head = config.model.head
    return lambda label: said(head.kind, label, head.label_names)


def targets(sample: Sample, topology: str) -> Tensor:
    """The labels [T]; -100 where nothing is predicted."""
    labels = sample["labels"].clone()
    if topology == "decoder":
        labels[0] = IGNORED  # no token precedes it
    return labels


def as_json(
    sample: Sample, numbers: Sequence[int], model: ModelConfig, label: Callable[[Tensor], str] | None = None
) -> dict[str, Any]:
    """A sample of tokens without its padding. numbers: indices of its documents in the source. label: `of_labels`."""
    ids = sample["input_ids"]
    real = sample.get("attention_mask", torch.ones_like(ids)) != 0
    source = numbers[0] if len(numbers) == 1 else list(numbers)
    if label is not None:
        n = int(real.sum())
        made = {"input_ids": ids[real].tolist(), "trained": [False] * n, "documents": [0] * n}
        return {**made, "label": label(sample["labels"]), "source": source}
    labels = targets(sample, model.topology)
    trained = labels != IGNORED if model.topology != "encoder_decoder" else torch.zeros_like(real)
    documents = sample.get("document_ids", torch.zeros_like(ids))
    made = {"input_ids": ids[real].tolist(), "trained": trained[real].tolist(), "documents": documents[real].tolist()}
    if model.topology == "encoder_decoder":
        written = sample.get("decoder_document_ids")
        read = shifted_right(model, labels[None], None if written is None else written[None])
        made |= {"decoder_input_ids": read[0].tolist(), "labels": labels.tolist()}
    return {**made, "source": source}


def answers_of(sample: Sample) -> Iterator[Sample]:
    """Of each pair the preferred answer, then the other one, both without padding."""
    documents, real = sample["document_ids"], sample["attention_mask"] != 0
    for number in sorted(set(documents[real].tolist())):
        here = documents == number
        part = {name: value[here] for name, value in sample.items() if value.shape == here.shape}
        yield {**part, "document_ids": torch.zeros_like(part["document_ids"])}


def pairs_as_json(sample: Sample, numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
    """An object for each pair of a row. numbers: of the pairs' rows in the source."""
    made = [
        {
            "input_ids": side["input_ids"].tolist(), "trained": (side["labels"] != IGNORED).tolist(),
            "documents": side["document_ids"].tolist(),
        }
        for side in answers_of(sample)
    ]
    for chosen, rejected, number in zip(made[::2], made[1::2], numbers, strict=True):
        yield {"chosen": {**chosen, "source": number}, "rejected": {**rejected, "source": number}}


def pieces_of(tokenizer: Tokenizer | None) -> Pieces:
    """How to show a token id: its text; if that is not whole characters, its name; if unknown, its number."""
    if tokenizer is None:
        return str
    special = tokenizer.special_ids()

    def piece(i: int) -> str:
        name = tokenizer.backend.id_to_token(i)
        text = "" if i in special else tokenizer.decode([i])
        if name is None or (text and "\ufffd" not in text):
            return visible(text).replace("\n", "⏎") if name is not None else f"<{i}>"
        return str(name)

    return piece


class Writer:
    """Samples as lines. Without colours, trained tokens stand between « and »."""

    def __init__(
        self, piece: Pieces, topology: str, coloured: bool, label: Callable[[Tensor], str] | None = None,
        pairs: bool = False,
    ) -> None:
        self.piece, self.topology, self.coloured, self.label, self.pairs = piece, topology, coloured, label, pairs

    def legend(self, batch: Sample) -> str:
        if "pixel_values" in batch:
            return ""
        if self.label is not None:
            return "Pieces end at ·."
        trained = "green" if self.coloured else "between « and »"
        hidden = ", behind what is read in their place" if self.topology == "encoder" else ""
        documents = "" if self.pairs else ", documents at ‖"
        return f"Pieces end at ·{documents}; trained: {trained}{hidden}."

    def lines(self, sample: Sample) -> Iterator[Text]:
        if "pixel_values" in sample:
            yield from self._image(sample)
            return
        if self.label is not None:
            head = f"sample {int(sample['sample_index'])}: {self._n_tokens(sample)} tokens read, label "
            yield Text(head, style="bold").append(self.label(sample["labels"]), style=_STYLES["trained"])
            ids = sample["input_ids"]
            none = torch.full_like(ids, IGNORED)
            yield Text("  ").append(self._written(ids, none, None, sample.get("attention_mask")))
            return
        labels = targets(sample, self.topology)
        n, n_trained = self._n_tokens(sample), int((labels != IGNORED).sum())
        yield Text(
            f"sample {int(sample['sample_index'])}: {n} tokens read, {n_trained} trained{self._beside(sample)}",
            style="bold"
        )
        if self.pairs:
            for k, side in enumerate(answers_of(sample)):
                name = "  rejected  " if k % 2 else "  chosen    "
                yield Text(name).append(self._written(side["input_ids"], side["labels"], None, None))
        elif self.topology == "encoder_decoder":
            ids = sample["input_ids"]
            yield Text("  input   ").append(self._written(
                ids, torch.full_like(ids, IGNORED), sample.get("document_ids"), sample.get("attention_mask")
            ))
            kept = labels != IGNORED
            documents = sample.get("decoder_document_ids")
            yield Text("  target  ").append(
                self._written(labels[kept], labels[kept], None if documents is None else documents[kept], None)
            )
        else:
            yield Text("  ").append(
                self._written(sample["input_ids"], labels, sample.get("document_ids"), sample.get("attention_mask"))
            )

    @staticmethod
    def _n_tokens(sample: Sample) -> int:
        mask = sample.get("attention_mask")
        return int((sample["input_ids"] if mask is None else mask[mask != 0]).numel())

    def _beside(self, sample: Sample) -> str:
        """Further facts of the sample: documents or pairs, prefix, next sentence."""
        told = ""
        if self.pairs:
            told += f", {sum(1 for _ in answers_of(sample)) // 2} pairs"
        elif "document_ids" in sample:
            told += f", {len(set(sample['document_ids'].tolist()))} documents"
        if "prefix_mask" in sample:
            told += f", the first {int(sample['prefix_mask'].sum())} seen from both sides"
        if "next_sentence_label" in sample:
            told += ", the second segment " + (
                "is from elsewhere" if int(sample["next_sentence_label"]) else "follows the first"
            )
        return told

    def _written(self, ids_T: Tensor, labels_T: Tensor, documents_T: Tensor | None, mask_T: Tensor | None) -> Text:
        out = Text()
        n_padding = 0
        for t, (i, label) in enumerate(zip(ids_T.tolist(), labels_T.tolist(), strict=True)):
            if mask_T is not None and not mask_T[t]:
                n_padding += 1
                continue
            if out:
                border = documents_T is not None and bool(documents_T[t] != documents_T[t - 1])
                out.append(" ‖ " if border else "·", style=_STYLES["border" if border else "read"])
            if label == IGNORED:
                out.append(self.piece(i), style=_STYLES["read"])
                continue
            if label != i:
                out.append(self.piece(i), style=_STYLES["hidden"])
            elif self.topology == "encoder":
                out.append("=", style=_STYLES["hidden"])  # chosen for prediction, but left unmasked
            out.append(self.piece(label) if self.coloured else f"«{self.piece(label)}»", style=_STYLES["trained"])
        return out.append(f" ({n_padding} padding)", style=_STYLES["read"]) if n_padding else out

    def _image(self, sample: Sample) -> Iterator[Text]:
        pixels_CHW = sample["pixel_values"]
        C, H, W = pixels_CHW.shape
        spread = f"mean {float(pixels_CHW.mean()):.2f}, deviation {float(pixels_CHW.std()):.2f}"
        yield Text(
            f"sample {int(sample['sample_index'])}: class {int(sample['labels'])}, {C} channels of {H} x {W}, {spread}",
            style="bold"
        )
        gray_HW = pixels_CHW.mean(0)
        columns = min(2 * W, _COLUMNS)  # a character is twice as high as wide
        rows = max(1, round(columns * H / W / 2))
        small = torch.nn.functional.interpolate(
            gray_HW[None, None], (rows, columns), mode="bilinear", antialias=True
        )[0, 0]
        low, high = small.min(), small.max()
        shades = ((small - low) / (high - low).clamp(min=1e-6) * (len(_SHADES) - 1)).round().long()
        for row in shades.tolist():
            yield Text("  " + "".join(_SHADES[shade] for shade in row))

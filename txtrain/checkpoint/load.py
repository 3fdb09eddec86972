"""A trained model and its tokenizer: from a run, one of its checkpoints, or a Hugging Face folder."""

from __future__ import annotations

import dataclasses as dc
import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from txtrain.checkpoint import format as checkpoint
from txtrain.checkpoint import restore
from txtrain.errors import ConfigError
from txtrain.ground.convert import build
from txtrain.ground.files import path_of
from txtrain.ground.plain_files import check_keys, read_yaml
from txtrain.hf.hub import folder_of
from txtrain.hf.tensor_names import check_layers, names_in, tensor_names
from txtrain.model.config import ModelConfig

if TYPE_CHECKING:
    import torch

    from txtrain.data.tokenizer.tokenizer import Tokenizer
    from txtrain.hf.pieces import Source
    from txtrain.model.transformer import Transformer


T = TypeVar("T")
WEIGHTS = ("model", "ema")


@dc.dataclass(frozen=True)
class Described:
    """path: of the checkpoint or folder. tokenizer: the folder that holds it, or None."""

    path: Path
    model: ModelConfig
    tokenizer: Path | None
    is_hf: bool


@dc.dataclass(frozen=True)
class Loaded:
    """tokenizer: None if there is none."""

    path: Path
    model: Transformer
    tokenizer: Tokenizer | None


def describe(where: str | os.PathLike[str], key: str = "checkpoint") -> Described:
    """What `where` holds, without reading weights or importing torch. key: what an error calls it.

    Raises:
        ConfigError: there is no model, or its config is damaged, hostile or unsupported, or needs other `imports`.
    """
    folder = folder_of(where, key)
    if (folder / "config.json").is_file():
        from txtrain.hf.registry import read_config

        _, model = read_config(folder)
        check_layers(model, tensor_names(folder), str(folder / "config.json"))
        return Described(folder, model, _tokenizer_in(folder), True)
    return checkpoint.on_newest(folder, key, partial(_described, key))


def _described(key: str, path: Path) -> Described:
    """Of a checkpoint."""
    checkpoint.verify(path, key, tensors=False)
    model = _saved_config(path, key)
    check_layers(model, names_in(path.glob("*.safetensors")), str(path / "config.yaml"))
    return Described(path, model, _tokenizer_in(path / "tokenizer"), False)


def _tokenizer_in(folder: Path) -> Path | None:
    """The folder itself, if it holds a tokenizer."""
    names = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
    return folder if any((folder / name).is_file() for name in names) else None


def open_weights(
    where: str | os.PathLike[str], key: str = "checkpoint", finite: bool = False, turn: int = 0, of: int = 1
) -> Source:
    """The model at `where`, to be read tensor by tensor. Each of `of` ranks checks a part of the values.

    A checkpoint's files stay open until `Source.close`: its run may remove it before they are read.

    Args:
        finite: refuse weights that hold NaN or infinity.

    Raises:
        ConfigError: as `load`.
    """

    def opened(found: Described) -> Source:
        from txtrain.checkpoint.reader import Reader
        from txtrain.hf.load import open_folder
        from txtrain.hf.pieces import Source

        if found.is_hf:
            source = open_folder(found.path)
        else:
            reader = Reader(found.path)
            close = reader.hold()
            source = Source(found.path, _empty(found, None, key), reader.pieces("model."), close)
            restore.check_weights(found.path, source.model)
        restore.check_values(found.path, source.pieces[turn::of], restore.Reading(key, finite=finite))
        return source

    return _on(where, key, opened)


def resolve(where: str | os.PathLike[str], key: str) -> Path:
    """The folder or checkpoint that `where` means now.

    Raises:
        ConfigError: it is neither, nor a run or a folder of runs with a checkpoint.
    """
    folder = folder_of(where, key)
    return folder if (folder / "config.json").is_file() else checkpoint.locate(folder, key)


def provenance(path: Path) -> dict[str, Any]:
    """What `run.json` says of weights at a `resolve`d path: path, checkpoint and its step, sha256.

    sha256: of a checkpoint its file `complete`, which holds the checksums of all others; of a folder its file of
    weights, of several the lines that `sha256sum` prints of them.
    """
    is_hf = (path / "config.json").is_file()
    files = _weight_files(path) if is_hf else [path / checkpoint.MARKER]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sums = list(pool.map(_sha256, files))
    lines = "".join(f"{digest}  {file.name}\n" for digest, file in zip(sums, files, strict=True))
    return {
        "path": str(path.resolve()),
        "checkpoint": None if is_hf else path.name,
        "step": None if is_hf else checkpoint.read_state(path).step,
        "sha256": sums[0] if len(sums) == 1 else hashlib.sha256(lines.encode()).hexdigest(),
    }


def _weight_files(folder: Path) -> list[Path]:
    from txtrain.hf.weights import Weights

    return sorted(Weights(folder).files)


def _sha256(file: Path) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _on(where: str | os.PathLike[str], key: str, do: Callable[[Described], T]) -> T:
    folder = folder_of(where, key)
    if (folder / "config.json").is_file():
        return do(describe(folder, key))
    return checkpoint.on_newest(folder, key, lambda path: do(_described(key, path)))


def load(
    where: str | os.PathLike[str], device: torch.device | str = "cpu", key: str = "checkpoint", weights: str = "model",
    finite: bool = False,
) -> Loaded:
    """The model, on the device, in eval mode, and its tokenizer. A checkpoint's tensors are checked by checksum.

    Args:
        weights: model, or ema for the averaged ones.
        finite: refuse weights that hold NaN or infinity.

    Raises:
        ConfigError: as `describe`, or the weights are not the model's, or there are no averaged ones.
    """
    from txtrain.data.tokenizer.load import load_tokenizer

    def loaded(found: Described) -> Loaded:
        tokenizer = None if found.tokenizer is None else load_tokenizer(found.tokenizer)
        return Loaded(
            found.path, _model(found, device, tokenizer, weights, restore.Reading(key, finite=finite)), tokenizer
        )

    return _on(where, key, loaded)


def load_pretrained(
    where: str | os.PathLike[str], dtype: torch.dtype | None = None, weights: str = "model"
) -> Transformer:
    """The model of a Hugging Face folder, an export, a run (its newest checkpoint), a checkpoint or a folder of runs
    (the newest), on the default device, in eval mode.

    Args:
        dtype: of the parameters; None: torch's default.
        weights: model, or ema for the averaged ones of a run with ema.decay.

    Raises:
        ConfigError: as `load`.
    """
    import torch

    folder = path_of(where, "where")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(f"`dtype` must be a floating dtype of torch or None, but is {dtype!r} instead.")
    if weights not in WEIGHTS:
        raise ConfigError(f"`weights` must be one of {', '.join(WEIGHTS)}, but is {weights!r} instead.")
    if (folder / "config.json").is_file() or not checkpoint.exists(folder):
        from txtrain.hf.load import load_pretrained as from_hf

        _refuse_average(where, weights)
        return from_hf(folder, dtype)
    return load(where, torch.get_default_device(), weights=weights).model.to(dtype or torch.get_default_dtype())


def _refuse_average(where: str | os.PathLike[str], weights: str) -> None:
    if weights != "model":
        raise ConfigError(
            f"`weights` must be model for a Hugging Face folder, but is {weights} instead: "
            f"{os.fspath(where)!r} has one set of weights."
        )


def _model(
    found: Described, device: torch.device | str, tokenizer: Tokenizer | None, weights: str, how: restore.Reading
) -> Transformer:
    import torch

    if found.is_hf:
        from txtrain.hf.load import load_pretrained as from_hf

        _refuse_average(found.path, weights)
        with torch.device(device):
            model = from_hf(found.path)
        restore.check_finite(found.path, model, how)
        return model
    model = _empty(found, tokenizer, how.key).to_empty(device=device)
    restore.load_weights(found.path, model, weights, how)
    return model.eval()


def _empty(found: Described, tokenizer: Tokenizer | None, key: str) -> Transformer:
    """A checkpoint's model without storage, after a check that its files hold a model of this size."""
    import torch

    from txtrain.hf import generation_config
    from txtrain.hf.trainer import build_model

    checkpoint.verify(found.path, key)
    checkpoint.check_model(found.path, found.model)
    with torch.device("meta"):
        model = build_model(_with_ids(found.model, tokenizer))
    model.generation_file = generation_config.read(found.path)
    return model


def _with_ids(config: ModelConfig, tokenizer: Tokenizer | None) -> ModelConfig:
    """Fill in special ids that the config leaves to the tokenizer."""
    if tokenizer is None:
        return config
    known: dict[str, Any] = {
        "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id
    }
    return dc.replace(config, **{name: value for name, value in known.items() if getattr(config, name) is None})


def _saved_config(path: Path, key: str) -> ModelConfig:
    """From a checkpoint's config.yaml, which is only data: the files in its `imports` are not imported."""
    file = path / "config.yaml"
    raw = read_yaml(file)
    check_keys(raw, str(file), {"model": dict, "imports": list[str] | None})
    try:
        return build(ModelConfig, raw["model"])
    except ConfigError as e:
        if not raw.get("imports"):
            raise
        again = f"imports=[{','.join(raw['imports'])}]"
        raise ConfigError(
            *e.problems,
            f"`{key}`: its run used {again}. A checkpoint's code is never imported by itself: name it again.",
        ) from e

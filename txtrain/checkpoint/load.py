"""A trained model and its tokenizer: from a run, one of its checkpoints, or a Hugging Face folder."""

from __future__ import annotations

import dataclasses as dc
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from txtrain.checkpoint import format as checkpoint
from txtrain.checkpoint import restore
from txtrain.checkpoint.base import Adapter, Base, check_base, is_folder
from txtrain.checkpoint.base import missing as base_missing
from txtrain.checkpoint.described import Described, described_adapter, of_peft, on_described, saved_adapter
from txtrain.errors import ConfigError
from txtrain.ground.files import path_of
from txtrain.hf.digest import sha256_of
from txtrain.hf.lora_config import ADAPTER_CONFIG
from txtrain.model.adapter import AdapterConfig, factor_of
from txtrain.model.config import ModelConfig
from txtrain.model.transform import transform

if TYPE_CHECKING:
    import torch

    from txtrain.data.tokenizer.tokenizer import Tokenizer
    from txtrain.hf.pieces import Source
    from txtrain.model.transformer import Transformer

WEIGHTS = ("model", "ema")
_MOST_ADAPTERS = 16  # one above another, before their bases are taken for a circle


@dc.dataclass(frozen=True)
class Loaded:
    """tokenizer: None if there is none."""

    path: Path
    model: Transformer
    tokenizer: Tokenizer | None


def open_weights(
    where: str | os.PathLike[str], key: str = "checkpoint", finite: bool = False, turn: int = 0, of: int = 1,
    weights: str = "model", depth: int = 0,
) -> Source:
    """The model at `where`, to be read tensor by tensor. Each of `of` ranks checks a part of the values.

    A checkpoint's files stay open until `Source.close`: its run may remove it before they are read.

    Args:
        finite: refuse weights that hold NaN or infinity.
        weights: model, or ema for the averaged ones.
        depth: how many adapters lie above it.

    Raises:
        ConfigError: as `load`.
    """
    how = restore.Reading(key, finite=finite, depth=depth)
    return on_described(where, key, lambda found: _opened(found, how, weights, turn=turn, of=of))


def provenance(path: Path) -> dict[str, Any]:
    """What `run.json` says of weights at a `resolve`d path: path, checkpoint and its step, and their sha256."""
    is_hf = is_folder(path)
    return {
        "path": str(path.resolve()),
        "checkpoint": None if is_hf else path.name,
        "step": None if is_hf else checkpoint.read_state(path).step,
        "sha256": sha256_of(path),
    }


def _merged(found: Described, how: restore.Reading, turn: int = 0, of: int = 1, weights: str = "model") -> Source:
    """An adapter's base, read with the adapter merged into it."""
    from txtrain.hf.pieces import Source, merged

    assert found.base is not None
    if how.depth == _MOST_ADAPTERS:
        several = f"{_MOST_ADAPTERS} adapters, one above another"
        raise ConfigError(f"`{how.key}` must have at most {several}. Do the bases below {found.path} name each other?")
    base = open_base(found.base, how.key, how.finite, turn, of, how.depth + 1)
    adapter = _read_adapter(found, how, weights)
    if adapter.base is not None:
        check_base(adapter.base, base.path, how.key)
    source = _beside(base, adapter, found)
    pieces = merged(source.pieces, adapter.pairs)
    changed = [piece for piece, own in zip(pieces, source.pieces, strict=True) if piece is not own]
    restore.check_values(found.path, changed[turn::of], how)  # factors may be finite, and their product not
    return Source(found.path, source.model, pieces)


def _beside(base: Source, adapter: Adapter, found: Described) -> Source:
    """The adapter's model: of the base, but for what is trained whole.

    Raises:
        ConfigError: the base is of another model.
    """
    from txtrain.hf.pieces import Source, compare, piece_of, shapes_of

    model = _build(found.model, None, found.path)
    model.tokenizer_files, model.prefix_prompts = base.model.tokenizer_files, found.prefix_prompts
    model.generation_file = model.generation_file or base.model.generation_file
    model.banned_tokens = model.banned_tokens or base.model.banned_tokens
    wanted, whole = shapes_of(model), {name: tuple(tensor.shape) for name, tensor in adapter.whole.items()}
    there = {name: shape for name, shape in shapes_of(base.model).items() if name in wanted}
    compare(there | whole, wanted, str(base.path))
    own = [piece for piece in base.pieces if piece.name in wanted.keys() - whole.keys()]
    return Source(base.path, model, [*own, *(piece_of(name, tensor) for name, tensor in adapter.whole.items())])


def open_base(base: Base, key: str, finite: bool = False, turn: int = 0, of: int = 1, depth: int = 1) -> Source:
    """The weights that an adapter names, as `open_weights`.

    Raises:
        ConfigError: they are not there. LoadError: they are others.
    """
    if not os.path.exists(base.path):
        raise base_missing(base, key)
    if turn == 0:  # reads all of them: one rank does
        check_base(base, Path(base.path), key)
    return open_weights(base.path, key, finite, turn, of, depth=depth)


def _read_adapter(found: Described, how: restore.Reading, weights: str = "model") -> Adapter:
    """The adapter of a run or of PEFT's folder.

    Raises:
        ConfigError: it is of another model, or holds no averaged weights. LoadError: it is damaged, or not finite.
    """
    from txtrain.hf.pieces import fill, is_finite, shapes_of
    from txtrain.model import lora

    model = _build(found.model, None)
    if found.is_hf:
        from txtrain.hf.peft import AdapterFolder

        folder = AdapterFolder(found.path)
        _refuse_average(found.path, weights)
        adapter = Adapter(*folder.read(model.config, shapes_of(model)), Base(folder.base or "", folder.sha256))
        if how.finite and not all(map(is_finite, adapter.tensors)):
            raise checkpoint.LoadError(f"`{how.key}`: {found.path} must hold finite numbers, but does not.")
        return adapter
    import torch

    from txtrain.checkpoint.reader import Reader

    config = saved_adapter(found.path)
    transform(model, config.transforms(model.config))
    restore.check_weights(found.path, model)
    reader, wanted = Reader(found.path), lora.kept(model)
    averaged = reader.pieces("ema.") if weights == "ema" else []
    if weights == "ema" and not averaged:
        raise restore.no_average(found.path)
    pieces = [*reader.pieces("model."), *(piece for piece in averaged if piece.name in wanted)]
    restore.check_values(found.path, pieces, how)
    tensors = {n: torch.empty(t.shape, dtype=torch.float32, device="cpu") for n, t in wanted.items()}
    fill(tensors, pieces)
    whole = {name: tensor for name, tensor in tensors.items() if factor_of(name) is None}
    return Adapter(lora.pairs(tensors, config.scaling), whole, found.base)


@dc.dataclass(frozen=True)
class OpenAdapter:
    """An adapter without its base's weights. model: on the meta device. base: as the adapter names it."""

    path: Path
    adapter: Adapter
    model: Transformer
    base: Base
    config: Any  # LoraConfig; of PEFT's folder the defaults
    tokenizer: Tokenizer | None


def open_adapter(where: str, key: str = "checkpoint", weights: str = "model", finite: bool = True) -> OpenAdapter:
    """The adapter at `where`: a run with adapter=lora, a checkpoint of it, or PEFT's folder. Reads no base.

    Raises:
        ConfigError: there is none.
    """

    def opened(found: Described) -> OpenAdapter:
        from txtrain.data.tokenizer.load import load_tokenizer

        if found.base is None:
            raise ConfigError(
                f"`{key}` must be a run with adapter=lora, one of its checkpoints, or PEFT's folder, but {where!r} has "
                "no adapter."
            )
        adapter = _read_adapter(found, restore.Reading(key, finite=finite), weights)
        tokenizer = None if found.tokenizer is None else load_tokenizer(found.tokenizer)
        config = AdapterConfig(type="none") if found.is_hf else saved_adapter(found.path)
        model, base = _build(found.model, None), adapter.base or found.base
        return OpenAdapter(found.path, adapter, model, base, config, tokenizer)

    return on_described(where, key, opened)


@dc.dataclass(frozen=True)
class Opened:
    """As `Loaded`, with the weights still in their files."""

    path: Path
    source: Source
    tokenizer: Tokenizer | None


def open_model(
    where: str | os.PathLike[str], key: str = "checkpoint", weights: str = "model", finite: bool = False
) -> Opened:
    """The model at `where`, to be read tensor by tensor (`open_weights`), and its tokenizer; arguments and errors as
    `load`."""
    from txtrain.data.tokenizer.load import load_tokenizer

    def opened(found: Described) -> Opened:
        tokenizer = None if found.tokenizer is None else load_tokenizer(found.tokenizer)
        how = restore.Reading(key, finite=finite)
        source = _opened(found, how, weights, tokenizer, prefix="" if found.is_hf else "model.")
        return Opened(found.path, source, tokenizer)

    return on_described(where, key, opened)


def _opened(
    found: Described, how: restore.Reading, weights: str = "model", tokenizer: Tokenizer | None = None,
    turn: int = 0, of: int = 1, prefix: str = "",
) -> Source:
    from txtrain.checkpoint.reader import Reader
    from txtrain.hf.load import open_folder
    from txtrain.hf.pieces import Source

    if found.base is not None:
        return _merged(found, how, turn, of, weights)
    if found.is_hf:
        _refuse_average(found.path, weights)
        source = open_folder(found.path)
    else:
        reader = Reader(found.path)
        close = reader.hold()
        averaged = reader.pieces("ema.") if restore.check_averaged(found.path, weights) else []
        names = {piece.name for piece in averaged}
        others = [piece for piece in reader.pieces("model.") if piece.name not in names]
        source = Source(found.path, _empty(found, tokenizer, how.key), [*others, *averaged], close)
        restore.check_weights(found.path, source.model)
    restore.check_values(found.path, source.pieces[turn::of], how, prefix)
    return source


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

    return on_described(where, key, loaded)


def load_pretrained(
    where: str | os.PathLike[str], dtype: torch.dtype | None = None, weights: str = "model",
    adapter: str | os.PathLike[str] | None = None,
) -> Transformer:
    """The model of a Hugging Face folder, an export, a run (its newest checkpoint), a checkpoint or a folder of runs
    (the newest), on the default device, in eval mode.

    Args:
        dtype: of the parameters; None: torch's default.
        weights: model, or ema for the averaged ones of a run with ema.decay; with an adapter, the adapter's.
        adapter: PEFT's folder, or a run with adapter=lora or one of its checkpoints, to be added to the model of
            `where`. It is not merged: `txtrain.save_pretrained` does that. Without this argument the model of such a
            run or folder is its base with the adapter merged.

    Raises:
        ConfigError: as `load`.
    """
    import torch

    folder = path_of(where, "where")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(f"`dtype` must be a floating dtype of torch or None, but is {dtype!r} instead.")
    if weights not in WEIGHTS:
        raise ConfigError(f"`weights` must be one of {', '.join(WEIGHTS)}, but is {weights!r} instead.")
    if adapter is not None:
        return _with_adapter(folder, path_of(adapter, "adapter"), weights).to(dtype or torch.get_default_dtype())
    if (folder / "config.json").is_file() or not (is_folder(folder) or checkpoint.exists(folder)):
        from txtrain.hf.load import load_pretrained as from_hf

        _refuse_average(where, weights)
        return from_hf(folder, dtype)
    return load(where, torch.get_default_device(), weights=weights).model.to(dtype or torch.get_default_dtype())


def _with_adapter(base: Path, where: Path, weights: str) -> Transformer:
    import torch

    from txtrain.model import lora

    source = open_weights(base, "where")

    def read(found: Described) -> tuple[Adapter, Transformer]:
        adapter = _read_adapter(found, restore.Reading("adapter"), weights)
        return adapter, _beside(source, adapter, found).load(torch.get_default_device())

    if (where / ADAPTER_CONFIG).is_file():
        adapter, model = read(Described(where, of_peft(where, source.model.config), None, True))
    else:
        adapter, model = checkpoint.on_newest(where, "adapter", lambda path: read(described_adapter(path, where)))
    named, pairs = adapter.base, adapter.pairs
    if named is not None and named.sha256:
        here = base if is_folder(base) else checkpoint.locate(base, "where")
        if sha256_of(here) != named.sha256:
            warnings.warn(f"{where} was trained on other weights than those in {here}: {named.path}.", stacklevel=3)
    lora.attach(model, {name: (pair.A.shape[-2], pair.scaling) for name, pair in pairs.items()}, whole=adapter.whole)
    tensors = model.state_dict()
    for name, pair in pairs.items():
        for kind, values in (("A", pair.A), ("B", pair.B)):
            own = f"{name}.lora_{kind}.weight"
            tensors[own if own in tensors else f"{name}_lora_{kind}"].copy_(values)
    return model.eval()


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

    from txtrain.model.shapes_only import with_storage

    if found.base is not None:
        return _merged(found, how, weights=weights).load(device)
    if found.is_hf:
        from txtrain.hf.load import load_pretrained as from_hf

        _refuse_average(found.path, weights)
        with torch.device(device):
            model = from_hf(found.path)
        restore.check_finite(found.path, model, how)
        return model
    model = with_storage(_empty(found, tokenizer, how.key), device)
    restore.load_weights(found.path, model, weights, how)
    return model.eval()


def _empty(found: Described, tokenizer: Tokenizer | None, key: str) -> Transformer:
    """A checkpoint's model without storage, after a check that its files hold a model of this size."""
    checkpoint.verify(found.path, key)
    checkpoint.check_model(found.path, found.model)
    model = _build(found.model, tokenizer, found.path)
    model.prefix_prompts = found.prefix_prompts
    return model


def _build(config: ModelConfig, tokenizer: Tokenizer | None, path: Path | None = None) -> Transformer:
    """path: of the checkpoint whose generation_config.json the model keeps."""
    from txtrain.hf import generation_config
    from txtrain.hf.trainer import build_model
    from txtrain.model.shapes_only import shapes_only

    with shapes_only():
        model = build_model(_with_ids(config, tokenizer))
    if path is not None:
        model.generation_file = generation_config.read(path)
        said = model.generation_file, str(path / generation_config.FILE)
        model.banned_tokens = generation_config.banned(model.config, *said)
    return model


def _with_ids(config: ModelConfig, tokenizer: Tokenizer | None) -> ModelConfig:
    """Fill in special ids that the config leaves to the tokenizer."""
    if tokenizer is None:
        return config
    known: dict[str, Any] = {
        "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id
    }
    return dc.replace(config, **{name: value for name, value in known.items() if getattr(config, name) is None})

"""Load tokenizers from files, recognised by their names, in the layout of `transformers`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from txtrain.data.sources.files import missing
from txtrain.data.sources.hub import client_errors, said_by, why_unreachable
from txtrain.data.tokenizer.folder import SOURCE_FILES, files_in
from txtrain.data.tokenizer.limits import check_parts, check_tables
from txtrain.data.tokenizer.tokenizer import ChatTemplate, Tokenizer, byte_tokenizer, told
from txtrain.errors import ConfigError, hint, shorten
from txtrain.ground.files import path_of
from txtrain.ground.plain_files import TOKENIZER_LIMIT, check_file, check_keys, read_bytes, read_json, read_text

# Usual names of the special tokens, if no file names them.
_USUAL = {
    "eos_token": ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[SEP]"),
    "bos_token": ("<s>", "<|begin_of_text|>", "<bos>", "[CLS]"),
    "pad_token": ("<pad>", "[PAD]"),
}
_OLDER_NAMES = {"eos_token": "sep_token", "bos_token": "cls_token"}  # BERT's
# Roles that a chat template may read, and the tokenizer classes without special tokens of their own.
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_GENERIC = ("PreTrainedTokenizerFast", "PreTrainedTokenizer", "TokenizersBackend")
_TEMPLATE = "chat_template.jinja"
_NAME = re.compile(r"\w[\w.-]{0,99}")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def load_tokenizer(where: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer `bytes`, of a folder, file, run or checkpoint, or of a name on the hub.

    Raises:
        ConfigError: it is none of these, or has no end-of-text token.
    """
    name = os.fspath(where)
    if name == "bytes":
        return byte_tokenizer()
    path = path_of(name, "data.tokenizer")
    if os.path.lexists(path) and not (path.is_file() or path.is_dir()):
        raise ConfigError(missing(name, "data.tokenizer", "a folder or a file"))
    path = _of_run(path) if path.exists() else _from_hub(name)
    folder = path if path.is_dir() else path.parent
    with told(f"be read from {path}"):
        return _loaded(path, folder, name)


def _of_run(path: Path) -> Path:
    """Of a checkpoint its tokenizer; of a run that of its newest: older ones are removed, and others (`.tmp`,
    `.damaged`) are none. Else the path as it is."""
    if (path / "state.json").is_file() and (path / "tokenizer").is_dir():
        return path / "tokenizer"
    found = {p.parent.name[5:]: p for p in path.glob("checkpoints/step_*/tokenizer")}
    return max(((int(step), p) for step, p in found.items() if re.fullmatch("[0-9]{8,15}", step)), default=(0, path))[1]


def _loaded(path: Path, folder: Path, name: str) -> Tokenizer:
    backend = _read(path, folder)
    check_parts(backend, str(path))
    ids = _special_ids(backend, folder)
    eos_id = ids["eos_token"]
    if eos_id is None:
        usual = ", ".join(_USUAL["eos_token"])
        raise ConfigError(
            f"`data.tokenizer`: {name} must have a token that ends a text: `eos_token` in its tokenizer_config.json, "
            f"or one of {usual} in its vocabulary."
        )
    bos_id = ids["bos_token"]
    return Tokenizer(
        backend,
        eos_id=eos_id,
        bos_id=eos_id if bos_id is None else bos_id,
        pad_id=ids["pad_token"],
        chat_template=_chat_template(folder),
        names=_names(backend, folder, ids),
        files=_one_of(path, folder) if path.is_file() else files_in(folder),
    )


def _one_of(path: Path, folder: Path) -> dict[str, bytes]:
    """The same of a tokenizer given as a file: files of other formats beside it may be of another tokenizer."""
    kind = path.name if path.name in _FORMATS else _BY_SUFFIX[path.suffix]
    others = {*_FORMATS} - ({"vocab.json", "merges.txt"} if kind in ("vocab.json", "merges.txt") else set())
    kept = {name: content for name, content in files_in(folder).items() if name not in others}
    return kept | {kind: read_bytes(path, TOKENIZER_LIMIT)}


# -------------------------------------------------------------------------------------------------------------- formats


def _tokenizer_json(folder: Path, name: str) -> Any:
    from tokenizers import Tokenizer as Backend

    return Backend.from_str(check_tables(read_text(folder / name, TOKENIZER_LIMIT), str(folder / name)))


def _byte_level_bpe(folder: Path, name: str) -> Any:
    """GPT-2's vocab.json and merges.txt."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    for file in ("vocab.json", "merges.txt"):
        if not (folder / file).is_file():
            raise ConfigError(f"`data.tokenizer`: {folder} must hold vocab.json and merges.txt, but has no {file}.")
        check_file(folder / file, TOKENIZER_LIMIT)
    backend = Backend(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=bool(_config(folder).get("add_prefix_space", False))
    )
    backend.decoder = decoders.ByteLevel()
    _mark_specials(backend, [*_USUAL["eos_token"], *_USUAL["bos_token"], *_USUAL["pad_token"], "<unk>", "<mask>"])
    return backend


def _word_piece(folder: Path, name: str) -> Any:
    """BERT's vocab.txt; lower-case unless tokenizer_config.json says otherwise."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    check_file(folder / name, TOKENIZER_LIMIT)
    lowercase = bool(_config(folder).get("do_lower_case", True))
    backend = Backend(models.WordPiece.from_file(str(folder / name), unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    _mark_specials(backend, ["[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]"])
    return backend


def _sentencepiece(folder: Path, name: str) -> Any:
    from txtrain.data.tokenizer.sentencepiece import convert

    return convert(folder / name)


# In order of preference. sentencepiece.bpe.model (XLM-R) is left out: its ids are shifted.
_FORMATS: dict[str, Callable[[Path, str], Any]] = {
    "tokenizer.json": _tokenizer_json,
    "tokenizer.model": _sentencepiece,
    "spiece.model": _sentencepiece,
    "vocab.json": _byte_level_bpe,
    "merges.txt": _byte_level_bpe,
    "vocab.txt": _word_piece,
}


_BY_SUFFIX = {".json": "tokenizer.json", ".model": "tokenizer.model"}  # of files of other names


def _read(path: Path, folder: Path) -> Any:
    if path.is_file():
        kind = path.name if path.name in _FORMATS else _BY_SUFFIX.get(path.suffix, "")
        if not kind:
            raise ConfigError(f"`data.tokenizer` must be one of {', '.join(_FORMATS)}, but is the file {path} instead.")
        return _FORMATS[kind](folder, path.name)
    for name, read in _FORMATS.items():
        if (folder / name).is_file():
            return read(folder, name)
    raise ConfigError(f"`data.tokenizer`: {folder} must hold one of {', '.join(_FORMATS)}, but holds none of them.")


# ------------------------------------------------------------------------------------------------------- special tokens


def _config(folder: Path) -> dict[str, Any]:
    """The config of the folder's tokenizer; tokenizer_config.json wins over the older special_tokens_map.json."""
    said: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            said.update(read_json(folder / name))
    return said


def _special_ids(backend: Any, folder: Path) -> dict[str, int | None]:
    said = _config(folder)
    found: dict[str, int | None] = {}
    for role, usual in _USUAL.items():
        token = _said(said, role, folder) or _said(said, _OLDER_NAMES.get(role, ""), folder)
        names = [token] if token else usual
        found[role] = next((i for i in map(backend.token_to_id, names) if i is not None), None)
    return found


def _said(said: Mapping[str, Any], role: str, folder: Path) -> str | None:
    token = said.get(role)
    if isinstance(token, dict):  # a serialised AddedToken
        token = token.get("content")
    if token is not None and not isinstance(token, str):
        raise ConfigError(f"{folder}: `{role}` of its tokenizer must be text, but is {shorten(repr(token))} instead.")
    return token


def _names(backend: Any, folder: Path, ids: Mapping[str, int | None]) -> dict[str, str]:
    """The special tokens that `transformers` gives to a chat template: of the files, and of the tokenizer's class."""
    said = _config(folder)
    known = {role: said[role] for role in _NAMED if isinstance(said.get(role), (str, dict))}
    found = {role: token for role in known if (token := _said(known, role, folder)) is not None}
    if said.get("tokenizer_class") not in _GENERIC:
        own = {role: i for role, i in ids.items() if i is not None and role not in said and role != "pad_token"}
        found = {role: backend.id_to_token(i) for role, i in own.items()} | found
    return found


def _chat_template(folder: Path) -> ChatTemplate | None:
    """The templates in the folder's .jinja files, or in `chat_template` of its tokenizer_config.json.

    Raises:
        ConfigError: none of several templates is called default.
    """
    files = {path.stem: path for path in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    if (folder / _TEMPLATE).is_file():
        files["default"] = folder / _TEMPLATE
    texts = {name: read_text(path) for name, path in files.items()}
    where = folder / _TEMPLATE
    if "default" not in texts:
        where, said = folder / "tokenizer_config.json", _config(folder).get("chat_template")
        if isinstance(said, list):
            kind = list[dict[str, str]]
            check_keys({"chat_template": said}, str(where), {"chat_template": kind})
            said = {one.get("name", ""): one.get("template", "") for one in said}
            if (strange := next((name for name in said if not _NAME.fullmatch(name)), None)) is not None:
                raise ConfigError(
                    f"{where}: the name of a chat template must be a word, which becomes that of a file, "
                    f"but is {shorten(repr(strange))} instead."
                )
        elif said is not None:
            check_keys({"chat_template": said}, str(where), {"chat_template": str})
            said = {"default": said}
        texts |= said or {}
    if texts and "default" not in texts:
        names = shorten(", ".join(texts))
        raise ConfigError(f"{where}: one of its chat templates must be called default, but they are called {names}.")
    return ChatTemplate(texts, str(where)) if texts else None


def _mark_specials(backend: Any, names: list[str]) -> None:
    backend.add_special_tokens([name for name in names if backend.token_to_id(name) is not None])


# ------------------------------------------------------------------------------------------------------------------ hub


def _from_hub(name: str) -> Path:
    """The folder of the hub's tokenizer files: in the cache, else downloaded."""
    looks_local = (
        name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix in (".json", ".model", ".txt")
    )
    if looks_local or not _HUB_NAME.fullmatch(name):
        raise ConfigError(missing(name, "data.tokenizer", "a folder, a file, a hub name, bytes or train"))
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    templates = _TEMPLATE, "additional_chat_templates/*.jinja"
    wanted = [*SOURCE_FILES, *templates]
    try:
        cached = Path(snapshot_download(name, allow_patterns=wanted, local_files_only=True))
        if any((cached / file).is_file() for file in _FORMATS):
            return cached
    except LocalEntryNotFoundError:
        pass
    near = hint(name, ("bytes", "train", *os.listdir()))
    if reason := why_unreachable():
        raise ConfigError(
            f"`data.tokenizer` must be a folder, a file, a hub name, bytes or train, "
            f"but {name} is no file here nor in the hub's cache, and {reason}.{near}"
        )
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except client_errors() as e:
        raise ConfigError(
            f"`data.tokenizer` must be a folder, a file, a hub name, bytes or train, "
            f"but is {name} instead: {said_by(e).rstrip('.')}.{near}"
        ) from e

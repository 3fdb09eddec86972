"""The files of a tokenizer in a folder, by the names that `transformers` gives them. No torch, no tokenizers."""

from __future__ import annotations

from pathlib import Path

from txtrain.ground.plain_files import TOKENIZER_LIMIT, read_bytes

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")  # of `Tokenizer.save`
CHAT_TEMPLATES = ("chat_template.jinja", "additional_chat_templates")
# Of any tokenizer; and additional_chat_templates/*.jinja.
SOURCE_FILES = (
    *TOKENIZER_FILES, "special_tokens_map.json", "added_tokens.json", CHAT_TEMPLATES[0], "tokenizer.model",
    "spiece.model", "vocab.json", "merges.txt", "vocab.txt", "source.spm", "target.spm",
)


def files_in(folder: Path) -> dict[str, bytes]:
    """Name -> content of the folder's tokenizer files."""
    templates = (f"{path.parent.name}/{path.name}" for path in sorted(folder.glob("additional_chat_templates/*.jinja")))
    there = [name for name in SOURCE_FILES if (folder / name).is_file()]
    return {name: read_bytes(folder / name, TOKENIZER_LIMIT) for name in (*there, *templates)}

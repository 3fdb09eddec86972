"""data=wikitext (Merity et al. 2016, 1609.07843): articles, from files or from the hub's Salesforce/wikitext."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from txtrain.data.sources.files import Limits, lines_of
from txtrain.data.sources.hub import HubUnreachable, load_dataset
from txtrain.data.sources.source import Split
from txtrain.data.sources.text import TextFiles
from txtrain.errors import ConfigError

REPOSITORY = "Salesforce/wikitext"
_TITLE = re.compile(r" = [^=].* = \n?")  # ` = Title = `; sections are ` = = Section = = `


class WikiText:
    """One document per article, its title first. With `path`: files in WikiText's format; else the hub or its cache."""

    def __init__(
        self,
        path: str | tuple[str, ...] | None,
        val_path: str | tuple[str, ...] | None,
        name: str,
        max_expansion: float = Limits().max_expansion,
        max_text_bytes: int = Limits().max_text_bytes,
        encoding_errors: str = Limits().encoding_errors,
        bad_rows: str = "refuse",
    ) -> None:
        if val_path and not path:
            raise ConfigError(
                "`data.val_path` must stand beside data.path with data=wikitext: "
                "the hub's set has its own validation split."
            )
        limits = max_expansion, max_text_bytes, encoding_errors, bad_rows
        self.files = TextFiles(path, val_path, "text", *limits) if path else None
        self.skipped = self.files.skipped if self.files else None
        self.name = name
        self.has_validation = self.files.has_validation if self.files else True

    def unavailable(self) -> str | None:
        """Why the text is unavailable; None if it is not. Downloads it if it is not in the cache."""
        if self.files:
            return None
        try:
            load_dataset(REPOSITORY, self.name)
        except HubUnreachable as e:
            return str(e)
        return None

    def documents(self, split: Split) -> Iterator[str]:
        if self.files:
            for text in self.files.documents(split):
                yield from articles(lines_of(text))
        else:
            rows = load_dataset(REPOSITORY, self.name)[split]
            lines = (line for batch in rows.iter(batch_size=1000) for line in batch["text"])
            yield from articles(line if line.endswith("\n") else line + "\n" for line in lines)

    def identity(self) -> str:
        if self.files:
            return f"wikitext {self.files.identity()}"
        splits = load_dataset(REPOSITORY, self.name)
        return f"wikitext {self.name} {splits['train']._fingerprint} {splits['validation']._fingerprint}"

    def describe(self) -> str:
        return f"WikiText articles of {self.files.describe()}" if self.files else f"{REPOSITORY} {self.name}"

    @property
    def n_bytes(self) -> int | None:
        return self.files.n_bytes if self.files else None


def articles(lines: Iterable[str]) -> Iterator[str]:
    """Lines joined to articles, which begin at titles. Text before the first title belongs to the first article."""
    article: list[str] = []
    titled = False
    for line in lines:
        if _TITLE.fullmatch(line):
            if titled:
                yield "".join(article)
                article = []
            titled = True
        article.append(line)
    if article:
        yield "".join(article)

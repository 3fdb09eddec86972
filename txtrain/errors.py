"""Errors that a user can fix, in one form: the dotted path, what is allowed, the value, the nearest right one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def visible(text: str) -> str:
    """The text of a stranger's file or of a model, with control characters spelt out: a terminal would execute them."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


class ConfigError(ValueError):
    """An error that the user can fix. One problem a line; the command line prints it and exits with 2."""

    def __init__(self, *problems: str) -> None:
        self.problems: tuple[str, ...] = tuple(dict.fromkeys(map(visible, problems)))
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, ...]]:
        return (type(self), self.problems)  # launchers pickle exceptions


class RunError(ConfigError):
    """An error found after the run's folder was made, as in a row of its data: exit code 1, not 2."""


def denied(e: PermissionError) -> str:
    """The sentence on a file or a folder that may not be used.

    Raises:
        PermissionError: `e` itself, where it names none.
    """
    if e.filename is None:
        raise e
    return f"{e.filename} cannot be read or written: {e.strerror}."


# Other tools' words for values: the first of ours that is an option.
_MEANT = {
    "bf16": "bf16-mixed bfloat16", "16": "bf16-mixed", "16-mixed": "bf16-mixed", "fp16": "bf16-mixed float16",
    "bfloat16": "bf16-mixed", "float16": "bf16-mixed", "32": "32-true float32", "fp32": "32-true float32",
    "float32": "32-true", "cuda": "gpu", "clm": "causal_lm", "mlm": "masked_lm", "val": "validation",
    "zero1": "deepspeed_stage_1", "zero2": "deepspeed_stage_2", "zero3": "deepspeed_stage_3",
}


def nearest(word: object, options: Iterable[object], cutoff: float = 0.6) -> str | None:
    """The option that `word` was most likely meant to be, or None. Case is ignored; among equally near options one
    with the same first letter wins."""
    meant = str(word)[:100].casefold()
    folded = {str(o).casefold(): str(o) for o in options}
    if known := [folded[word] for word in _MEANT.get(meant, "").split() if word in folded]:
        return known[0]
    got = difflib.get_close_matches(meant, folded, n=len(folded) or 1, cutoff=cutoff)
    matcher = difflib.SequenceMatcher(b=meant)

    def nearness(option: str) -> tuple[float, bool]:
        matcher.set_seq1(option)
        return matcher.ratio(), option[:1] == meant[:1]

    return folded[max(got, key=nearness)] if got else None


def hint(word: object, options: Iterable[object], template: str = "{}") -> str:
    """` Did you mean X?`, to be appended to a sentence, or an empty string."""
    got = nearest(word, options)
    return f" Did you mean {template.format(got)}?" if got else ""


def divisors_near(value: int, total: int, n: int = 2) -> list[int]:
    """The divisors of `total` closest to `value`, ascending."""
    divisors = [d for d in range(1, abs(total) + 1) if total % d == 0] if abs(total) <= 1_000_000 else []
    return sorted(sorted(divisors, key=lambda d: (abs(d - value), d))[:n])


_SHOWN = 80  # characters of a value or a name in a message


def shorten(what: object) -> str:
    """A foreign text in one line of limited length, for a message."""
    text = " ".join(str(what).split())
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."

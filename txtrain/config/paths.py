"""Where the configuration files lie: at the top of a checkout, inside the package of an installed wheel. Names of options, without Hydra."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
DATA = _PACKAGE if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent  # holds conf/ and recipes/
CONF = DATA / "conf"


def families() -> list[str]:
    """The names that `model=` accepts: families at laptop size, and published models."""
    return options("model")


def options(group: str) -> list[str]:
    """Names of the packaged options of a group, such as model or model/attention; `recipes` too."""
    folder = DATA / group if group == "recipes" else CONF / group
    return sorted(f.relative_to(folder).with_suffix("").as_posix() for f in folder.glob("**/*.yaml" if group == "recipes" else "*.yaml"))

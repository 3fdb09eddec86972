"""`init_from`: the model that a run starts from, as a family of its own; the command line comes on top.

    conf/model/bert.yaml     objective, optimizer, trainer and data of its family
    model/init_from          the folder's values, over it
    command line             the user's, by the graft rule

A size that is named beside it (`model=bert_base`) must have the folder's values. No torch.
"""

from __future__ import annotations

import dataclasses as dc
import re
from collections.abc import Iterator
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf, open_dict

from txtrain.checkpoint.described import Described, describe
from txtrain.checkpoint.format import newest_run
from txtrain.checkpoint.run_folder import begun_with
from txtrain.config.composed import default_name
from txtrain.config.literals import escape
from txtrain.errors import ConfigError
from txtrain.ground.convert import key_paths, part, plain
from txtrain.ground.patterns import pattern_problems
from txtrain.hf import describe as resolved
from txtrain.model.config import ModelConfig
from txtrain.registry import MODEL_AXES, TABLE, group_of
from txtrain.run_config import RunConfig

KEY = "init_from"
OPTION = "init_from"  # its name in the group `model`
_SHOWN = 5  # differences in a message
_TABLE = "embedding.token.weight"  # has a row for each token


def find(cfg: DictConfig, named: str | None, data: str) -> Described:
    """What `init_from` holds; of a folder of runs the newest, or the one that this run was begun with, which is written
    into `cfg`. named, data: options of their groups; named None: no model is named beside it.

    Raises:
        ConfigError: there is no model, or it cannot be read.
    """
    where, run_dir, name = str(cfg[KEY]), cfg.get("run_dir"), cfg.get("name")

    def begun(model: str) -> str | None:
        return begun_with(run_dir, name or default_name(model, data), KEY, where)

    known = run_dir is not None or name is not None or named is not None
    start = (begun(named or "") if known else None) or newest_run(where, KEY)
    found = describe(start, key=KEY)
    if not known and (before := begun(found.model.family)) is not None:
        start, found = before, describe(before, key=KEY)
    with open_dict(cfg):
        cfg[KEY] = escape(start)
    return found


def store(model: ModelConfig, parent: str | None, named: bool) -> None:
    """Make the model an option of the group `model`.

    parent: the option whose objective, optimizer, trainer and data it has; None: none is known. named: by the user, so
    that its labels hold.
    """
    values = plain(model)
    kinds = {axis: values[axis].pop("type") for axis in MODEL_AXES}
    for label in (["family", "published", *(["size"] if named else [])] if parent else []):
        del values[label]
    below = [parent, "_self_", *({f"override {axis}": kind} for axis, kind in kinds.items())]
    alone = [*({axis: kind} for axis, kind in kinds.items()), "_self_"]
    node = {"defaults": below if parent else alone, **_escaped(values)}
    ConfigStore.instance().store(OPTION, node, "model")


def _escaped(value: Any) -> Any:
    """Without references: a stranger's text is no template."""
    if isinstance(value, dict):
        return {key: _escaped(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_escaped(v) for v in value]
    return escape(value) if isinstance(value, str) else value


def check_named(cfg: DictConfig, again: DictConfig, named: str) -> None:
    """Compare the model that is named beside it (`cfg`) with the folder's (`again`), every null resolved.

    Both have the command line's values. Labels, token ids, dropout and initial values may differ.

    Raises:
        ConfigError: another value does.
    """
    (ours, problems), (theirs, _) = (part(ModelConfig, _plain(c.model), "model") for c in (cfg, again))
    if problems:
        raise ConfigError(*problems)
    if ours is None or theirs is None:
        return  # the whole is refused later
    ours, theirs = _counted(ours), _counted(theirs)
    here, there = resolved.describe(ours), resolved.describe(theirs)
    different = resolved.differences(here, there)
    # values that follow from others are told only where no other differs
    names = [name for name in different if f"model.{name}" in key_paths(RunConfig)] or different
    wrong = list(_told(here, there, names, ours, theirs, str(again[KEY])))
    if wrong:
        more = [f"and {len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else []
        raise ConfigError(
            *wrong[:_SHOWN], *more, f"Leave out model={named}: the architecture comes with the weights."
        )


def _counted(model: ModelConfig) -> ModelConfig:
    """With a number of classes: where it is still to be read from the data, it is the same for both."""
    if not model.head.pools or model.head.n_classes is not None:
        return model
    return dc.replace(model, head=dc.replace(model.head, n_classes=2))


def _told(
    here: dict[str, Any], there: dict[str, Any], names: list[str], ours: ModelConfig, theirs: ModelConfig, where: str
) -> Iterator[str]:
    other = [axis for axis in MODEL_AXES if axis in names]
    for axis in other:
        a, b = (getattr(model, axis).type for model in (theirs, ours))
        yield f"`{group_of(axis)}` must be {a}, as in init_from={where}, but is {b} instead."
    for name in names:
        if name.partition(".")[0] not in other:
            a, b = there.get(name), here.get(name)
            yield f"`model.{name}` must be {a!r}, as in init_from={where}, but is {b!r} instead."


def settle_tokenizer(cfg: DictConfig, found: Described, given: list[str]) -> None:
    """Take the folder's tokenizer where none is given, in place; with a larger one the vocabulary grows.

    Raises:
        ConfigError: there is none and the data need one, or a larger one has moved the folder's tokens.
    """
    option = TABLE["data"].get(str(cfg.data.get("type")))
    if option is None or option.config.kind == "images":
        return
    tokenizer = cfg.data.get("tokenizer", option.config.tokenizer)
    if tokenizer == "train" and "data.tokenizer" not in given:
        if found.tokenizer is None:
            raise ConfigError(f"`data.tokenizer` must be given with init_from={cfg[KEY]}: it has no tokenizer.")
        with open_dict(cfg):
            # of a run the run itself: it removes older checkpoints
            cfg.data.tokenizer = escape(str(found.tokenizer if found.is_hf else cfg[KEY]))
    elif isinstance(tokenizer, str) and tokenizer != "train":
        size = found.model.vocab_size
        if cfg.model.vocab_size == size and (grown := _grown(cfg, tokenizer, found)) > size:
            with open_dict(cfg):
                cfg.model.vocab_size = grown


def settle_adapter(cfg: DictConfig, found: Described, given: list[str]) -> None:
    """Have an adapter's run train another head than the folder's, in place."""
    adapts = cfg.get("adapter") and TABLE["adapter"][cfg.adapter.type].config.alone
    if adapts and cfg.model.head.type != found.model.head.type and "adapter.modules_to_save" not in given:
        with open_dict(cfg):
            cfg.adapter.modules_to_save = ["head"]


def _grown(cfg: DictConfig, name: str, found: Described) -> int:
    """The number of tokens of a tokenizer that is given instead of the folder's."""
    from txtrain.data.tokenizer.load import load_tokenizer

    tokenizer = load_tokenizer(name)
    if tokenizer.vocab_size > found.model.vocab_size and found.tokenizer is not None and not _anew(cfg):
        before, now = (t.backend.get_vocab() for t in (load_tokenizer(found.tokenizer), tokenizer))
        if moved := sorted((i, token) for token, i in before.items() if now.get(token) != i):
            i, token = moved[0]
            there = now.get(token, "absent")
            raise ConfigError(
                f"`data.tokenizer` must keep the tokens of init_from={cfg[KEY]}, whose {token!r} is {i}, but is {name} "
                f"instead, where it is {there}. Nearest: new tokens behind the old ones; or new vectors for all: "
                f"init_allow_missing=[{_TABLE}]."
            )
    return tokenizer.vocab_size


def _anew(cfg: DictConfig) -> bool:
    """Whether the vectors of tokens may be initialised anew."""
    patterns = [str(p) for p in cfg.get("init_allow_missing") or []]
    return not list(pattern_problems("", patterns)) and any(re.search(p, _TABLE) for p in patterns)


def _plain(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True)

"""`checkpoint=` of evaluate and predict: model, tokenizer, objective and the way of reading come with it. No torch."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from txtrain.config.compatibility import fits
from txtrain.config.composed import Composed
from txtrain.config.schema_of_trained import Evaluate, OnTrained
from txtrain.errors import ConfigError
from txtrain.ground.convert import build, without_foreign
from txtrain.ground.plain_files import check_keys, read_yaml
from txtrain.model.config import ModelConfig
from txtrain.registry import TABLE
from txtrain.run_config import RewardConfig

if TYPE_CHECKING:
    from txtrain.checkpoint.described import Described


def of_checkpoint(job: Composed, found: Described) -> Composed:
    """The job with what `found` holds.

    The data are those that the command line names, else those of the run. A run also says how long sequences are and
    whether they cross documents. The objective is the one that is named, else the run's, else the first that fits.

    Raises:
        ConfigError: values of the command line contradict the checkpoint, or no objective fits model and data.
    """
    config: OnTrained = job.config
    if isinstance(config, Evaluate) and config.tasks:
        of_data = ("data", "objective", "metrics", "reward", "split", "stride")
        if clash := [key for key in job.given if key.partition(".")[0] in of_data]:
            why = "must not be given with tasks, which have data and metrics of their own"
            raise ConfigError(*(f"`{key}` {why}." for key in clash))
        config = dc.replace(config, model=found.model)
        if problems := list(config.problems()):
            raise ConfigError(*problems)
        return dc.replace(job, config=config, grafts={})
    saved = {} if found.is_hf else read_yaml(found.path / "config.yaml")
    check_keys(saved, str(found.path / "config.yaml"), {"data": dict | None, "imports": list[str] | None})
    own = "data" not in job.given
    if own and found.is_hf:
        raise ConfigError(f"`data` must be given: {str(found.path)!r} is no run, which would name its own.")
    if own and "data.path" not in job.given and not isinstance(config, Evaluate):
        raise ConfigError("`data` must be given, or data.path: the rows to read.")
    foreign = without_foreign(type(config), saved, job.given)
    data = _own_data(job, saved) if own else _read_alike(job, saved)
    if data.sample_kind == "labels" and found.model.head.pools and "data.kind" not in job.given:
        data = dc.replace(data, kind=found.model.head.kind)
    if data.tokenizer == "train" and data.sample_kind != "images":
        if found.tokenizer is None:
            raise ConfigError(f"`data.tokenizer` must be given: {str(found.path)!r} has no tokenizer.")
        data = dc.replace(data, tokenizer=str(found.tokenizer))
    named = any(key.partition(".")[0] == "objective" for key in job.given)
    trained = None if named else _saved("objective", saved, job)
    config = dc.replace(config, data=data, objective=trained or config.objective)
    given = any(key.partition(".")[0] == "reward" for key in job.given)
    if data.sample_kind == "problems" and "reward" in saved and not given and config.reward == RewardConfig():
        config = dc.replace(config, reward=build(RewardConfig, saved["reward"], "reward", "`checkpoint`"))
    if isinstance(config, Evaluate) and own and "data.path" not in job.given:
        config = dc.replace(config, split=config.split or "validation")
    notes = (*job.notes, *foreign) if own else job.notes
    return dc.replace(job, config=fitted(config, found.model, named), grafts={}, notes=notes)


def fitted(config: OnTrained, model: ModelConfig, named: bool = False) -> Any:
    """The configuration for a model: with an objective that fits, and the split settled.

    named: the objective is the one to use, or an error.

    Raises:
        ConfigError: the configuration does not fit the model.
    """
    config = dc.replace(config, model=model)
    if isinstance(config, Evaluate):
        config = _measured(config, named)
    if problems := list(config.problems()):
        raise ConfigError(*problems)
    return config


def _measured(config: Evaluate, named: bool) -> Evaluate:
    model, kind, objective = config.model, config.data.sample_kind, config.objective
    if not named and not (objective.alone and fits(model, objective.type, kind)):
        objectives = TABLE["objective"].items()
        others = [name for name, o in objectives if o.config.alone and fits(model, name, kind)]
        if others:
            objective = TABLE["objective"][others[0]].config(type=others[0])
        elif objective.alone or not fits(model, objective.type, kind):
            able = (
                data for data, option in TABLE["data"].items()
                if any(o.config.alone and fits(model, name, option.config.sample_kind) for name, o in objectives)
            )
            raise ConfigError(
                f"`data={config.data.type}` must be data for this model, a {model.topology} with "
                f"model/head={model.head.type}, but is {kind} instead. It is evaluated on {', '.join(able) or 'none'}."
            )
    if not objective.alone:
        raise ConfigError(
            f"`objective` must be one that needs the trained model alone, but is {objective.type} instead, which reads "
            "another model beside it. Its values are in the run's metrics.csv. Other data: data=chat, with data.path."
        )
    where = vars(config.data)
    whole = where.get("path") is not None and not where.get("val_path") and not where.get("val_split")
    split = config.split or ("all" if whole else "validation")
    return dc.replace(config, objective=objective, split=split)


def _own_data(job: Composed, saved: Mapping[str, Any]) -> Any:
    """The run's data, with the values of the command line."""
    data = _saved("data", saved, job)
    if data is None:
        raise ConfigError("`data` must be given: the run's config.yaml names none.")
    names = {f.name for f in dc.fields(data)}
    given = [key.removeprefix("data.") for key in job.given if key.startswith("data.")]
    if other := [key for key in given if key.partition(".")[0] not in names]:
        whose = f"is no key of data={data.type}, the run's. Name the data too"
        raise ConfigError(*(f"`data.{key}` {whose}." for key in other))
    tops = {key.partition(".")[0] for key in given}
    changes = {name: getattr(job.config.data, name) for name in tops}
    if "path" in tops:  # the run's own validation set goes with its own path
        changes |= {name: None for name in ("val_path", "val_split") if name in names - tops}
    return dc.replace(data, **changes)


def _read_alike(job: Composed, saved: Mapping[str, Any]) -> Any:
    """The data of the command line, read as the run read its own: so long, and within documents or across them."""
    data, before = job.config.data, saved.get("data") or {}
    check_keys(before, "`checkpoint`: its run's data", {"seq_len": int | None, "cross_document_attention": bool | None})
    known = TABLE["data"].get(str(before.get("type")))
    if data.sample_kind == "images" or not saved or known is None or known.config.sample_kind == "images":
        return data
    alike = {
        key: before[key] for key in ("seq_len", "cross_document_attention")
        if f"data.{key}" not in job.given and before.get(key) is not None
    }
    return dc.replace(data, **alike)


def _saved(axis: str, saved: Mapping[str, Any], job: Composed) -> Any:
    """The option in a run's config.yaml, which is only data; None if there is no run.

    Raises:
        ConfigError: it is not known here, or damaged.
    """
    raw = saved.get(axis)
    if raw is None:
        return None
    kind = str(raw.get("type") if isinstance(raw, dict) else raw)
    if kind not in TABLE[axis]:
        imports = ",".join(saved.get("imports") or ())
        again = f" Its run used imports=[{imports}]: name it again." if imports else ""
        raise ConfigError(f"`checkpoint`: its run's {axis} is {kind!r}, which is not known here.{again}")
    return build(TABLE[axis][kind].config, raw, axis, "`checkpoint`")

"""What goes together in a run: objective, model and data; with the model's own rules one table, also of docs/axes.md. No torch.

The rules are made from what each objective's config declares (`topologies`, `heads`, `reads`), and from the tables here.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterator

from txtrain.model.config import ModelConfig
from txtrain.model.rules import Choices, Rule
from txtrain.registry import TABLE
from txtrain.run_config import RunConfig

KIND = "data.kind"
ALL_KINDS = ("text", "chat", "pairs", "images")


class RunRule(Rule):
    """A rule of a run. Beside the keys of the command line it knows `data.kind`: what the samples of a source are."""

    def told(self, choices: Choices) -> tuple[str, str, str]:
        key, allowed, value = super().told(choices)
        return (key, allowed, value) if key != KIND else ("data", f"a source of {allowed}", f"{choices['data'].type}, a source of {value},")

    def assignment(self, choices: Choices, key: str) -> str:
        return super().assignment(choices, key) if key != KIND else f"data={choices['data'].type}"

    @property
    def nearest(self) -> str:
        return super().nearest if self.key != KIND else f"data={', '.join(sources_of(self.allowed[0])[:1]) or 'a source of your own'}"


RUN_RULES = (
    RunRule({KIND: ("images",)}, "model/embedding", ("patch",), "an image enters as patches"),
    RunRule({KIND: ("images",)}, "data.seq_len", (None,), "an image has as many positions as the model has patches"),
    RunRule({KIND: ("text", "chat", "pairs")}, "model/embedding", ("token",), "text enters as tokens"),
)

OBJECTIVE_RULES = (
    RunRule({"objective": ("prefix_lm",)}, "model.mtp_depth", (0,), "causal_lm alone trains the modules for further tokens"),
    RunRule(
        {"objective": ("prefix_lm",), "model.topology": ("encoder_decoder",)},
        "data.packing",
        ("concat",),
        "the sequence is cut anywhere, padding would be on both sides",
    ),
    RunRule({"objective": ("span_corruption",)}, "data.packing", ("concat",), "padding would be corrupted, and be a target"),
)

DECLARED = {"topologies": "model.topology", "heads": "model/head", "reads": KIND}  # attributes of an objective's config, and what they restrict

WHY = {  # an objective of the user's own has the reason that stands last
    ("causal_lm", "model.topology"): "each token is told from those before it, and an encoder has read them all",
    ("masked_lm", "model.topology"): "a masked token is told from both sides, and a decoder sees one",
    ("span_corruption", "model.topology"): "what was dropped is a sequence of its own, beside the one that it was dropped from",
    ("prefix_lm", "model.topology"): "the rest is told token by token, and an encoder has read it all",
    ("seq2seq", "model.topology"): "a pair is read by one stack and written by another",
    ("seq2seq", KIND): "there must be a source and a target",
    ("sft", "model.topology"): "each token is told from those before it, and an encoder has read them all",
    ("sft", KIND): "there must be turns that are trained, and turns that are not",
    ("image_classification", KIND): "there must be images and their classes",
    ("image_classification", "model/head"): "an image has one class",
    ("", "model.topology"): "the objective is of another shape of model",
    ("", "model/head"): "the objective reads the scores of another head",
    ("", KIND): "the objective is made of other samples",
}


def objective_rules(name: str) -> list[Rule]:
    """What an objective's config declares, as rules, and what stands above."""
    config = TABLE["objective"][name].config
    declared = [(key, getattr(config, attribute)) for attribute, key in DECLARED.items()]
    made = [RunRule({"objective": (name,)}, key, allowed, WHY.get((name, key), WHY["", key])) for key, allowed in declared if allowed is not None]
    return [*made, *(rule for rule in OBJECTIVE_RULES if rule.given["objective"] == (name,))]


def objectives_for(model: ModelConfig) -> list[str]:
    """The objectives that a model allows, on data of a kind that they read."""
    kinds = {name: option.config.reads or ALL_KINDS for name, option in TABLE["objective"].items()}
    return [name for name, reads in kinds.items() if any(_fits(model, name, kind) for kind in reads)]


def _fits(model: ModelConfig, objective: str, kind: str) -> bool:
    choices = {"model": model, "objective": _Option(objective), "data": _Option("any", kind)}
    return not any(rule.broken_by(choices) for rule in (*objective_rules(objective), *RUN_RULES))


def problems(config: RunConfig) -> Iterator[str]:
    """What does not go together between objective, model and data: first what the model is wrong for."""
    choices = {"model": config.model, "objective": config.objective, "data": config.data}
    broken = [rule for rule in objective_rules(config.objective.type) if rule.broken_by(choices)]
    if broken and broken[0].key != KIND and (fitting := objectives_for(config.model)):
        yield broken[0].sentence(choices, nearest=_run_of(fitting[0], choices))
    else:
        yield from (rule.sentence(choices) for rule in (*broken, *RUN_RULES) if rule.broken_by(choices))


def _run_of(objective: str, choices: Choices) -> str:
    """`objective=masked_lm`, and the data where these must change too."""
    instead = dict(choices) | {"objective": _Option(objective)}
    return " ".join([f"objective={objective}", *(rule.nearest for rule in objective_rules(objective) if rule.broken_by(instead))])


@dc.dataclass(frozen=True)
class _Option:
    """As much of an objective or a source as the rules read."""

    type: str
    kind: str | None = None
    packing: str = "concat"
    seq_len: int | None = None


def sources_of(kind: str) -> list[str]:
    """The options of `data` whose samples are of that kind; first those that need no path."""
    configs = {name: option.config for name, option in TABLE["data"].items() if option.config.kind == kind}
    return sorted(configs, key=lambda name: any(f.name == "path" for f in dc.fields(configs[name])))

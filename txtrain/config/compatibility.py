"""What goes together: one table, read where a configuration is composed, by the tests, and by docs/axes.md. No torch.

A rule says: where these choices are made, that one must be one of those. Rules of the model hold for a model alone; the others tell
an objective's model and data, and are made from what each objective's config declares (`topologies`, `heads`, `reads`). Two options
that no rule separates go together: every position with every attention, norm, norm position and FFN, in every topology, windows and
packed documents included.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from txtrain.registry import MODEL_AXES, TABLE

if TYPE_CHECKING:
    from txtrain.config.schema import Train
    from txtrain.model.config import ModelConfig

Choices = Mapping[str, Any]  # model, and where there is a run objective and data: their configs
KIND = "data.kind"
ALL_KINDS = ("text", "pairs", "images")
GROUPS = ("objective", "data", *(f"model/{axis}" for axis in MODEL_AXES))


@dc.dataclass(frozen=True)
class Rule:
    """Where each key of `given` has one of its values, the value of `key` must be one of `allowed`, the first of them the nearest.

    Keys are those of the command line, but for `data.kind`: what the samples of a source are.
    """

    given: Mapping[str, tuple[Any, ...]]
    key: str
    allowed: tuple[Any, ...]
    why: str

    def broken_by(self, choices: Choices) -> bool:
        return all(value_of(choices, k) in values for k, values in self.given.items()) and value_of(choices, self.key) not in self.allowed

    def sentence(self, choices: Choices, nearest: str | None = None) -> str:
        given = " and ".join(_assignment(choices, key) for key in self.given)
        key, allowed, value = self.key, _either(self.allowed), _text(value_of(choices, self.key))
        if key == KIND:
            key, allowed, value = "data", f"a source of {allowed}", f"{choices['data'].type}, a source of {value},"
        return f"`{key}` must be {allowed} with {given}, but is {value} instead: {self.why}. Nearest: {nearest or self.nearest}."

    @property
    def nearest(self) -> str:
        value = self.allowed[0]
        if self.key != KIND:
            return f"{self.key}={_text(value)}"
        return f"data={', '.join(sources_of(value)[:1]) or 'a source of your own'}"


MODEL_RULES = (
    Rule({"model/head": ("mlm",)}, "model.topology", ("encoder",), "it predicts each token at its own place, which a decoder has just read"),
    Rule({"model/head": ("class",)}, "model.topology", ("encoder", "decoder"), "one class answers one sequence, and two stacks read two"),
    Rule(
        {"model/head": ("class",), "model.topology": ("decoder",)},
        "model.head.pooling",
        ("last", "mean"),
        "the first position of a decoder sees nothing but itself",
    ),
    Rule({"model/head": ("class",)}, "model.logit_softcap", (None,), "only scores of a vocabulary are capped"),
    Rule({"model/embedding": ("patch",)}, "model.topology", ("encoder", "decoder"), "a decoder beside the encoder reads tokens"),
    Rule({"model/embedding": ("patch",)}, "model/head", ("class",), "patches have no vocabulary that a head could predict"),
    Rule({"model/embedding": ("patch",)}, "model.tie_word_embeddings", (False,), "there is no table of words to tie the head to"),
    Rule({"model/embedding": ("patch",)}, "model.vocab_size", (0,), "patches have no vocabulary"),
    Rule({"model.topology": ("encoder", "encoder_decoder")}, "model.mtp_depth", (0,), "further tokens are told from those before, in one sequence"),
    Rule({"model/head": ("class",)}, "model.mtp_depth", (0,), "there is no further token to tell"),
    Rule({"model.topology": ("decoder", "encoder")}, "model.n_encoder_layers", (None,), "one stack has n_layers layers"),
    Rule({"model.topology": ("decoder", "encoder")}, "model.share_embeddings", (True,), "one stack has one embedding"),
)

RUN_RULES = (
    Rule({KIND: ("images",)}, "model/embedding", ("patch",), "an image enters as patches"),
    Rule({KIND: ("images",)}, "data.seq_len", (None,), "an image has as many positions as the model has patches"),
    Rule({KIND: ("text", "pairs")}, "model/embedding", ("token",), "text enters as tokens"),
)

OBJECTIVE_RULES = (
    Rule({"objective": ("prefix_lm",)}, "model.mtp_depth", (0,), "causal_lm alone trains the modules for further tokens"),
    Rule(
        {"objective": ("prefix_lm",), "model.topology": ("encoder_decoder",)},
        "data.packing",
        ("concat",),
        "the sequence is cut anywhere, padding would be on both sides",
    ),
    Rule({"objective": ("span_corruption",)}, "data.packing", ("concat",), "padding would be corrupted, and be a target"),
)

DECLARED = {"topologies": "model.topology", "heads": "model/head", "reads": KIND}  # attributes of an objective's config, and what they restrict

WHY = {  # an objective of the user's own has the reason that stands last
    ("causal_lm", "model.topology"): "each token is told from those before it, and an encoder has read them all",
    ("masked_lm", "model.topology"): "a masked token is told from both sides, and a decoder sees one",
    ("span_corruption", "model.topology"): "what was dropped is a sequence of its own, beside the one that it was dropped from",
    ("prefix_lm", "model.topology"): "the rest is told token by token, and an encoder has read it all",
    ("seq2seq", "model.topology"): "a pair is read by one stack and written by another",
    ("seq2seq", KIND): "there must be a source and a target",
    ("image_classification", KIND): "there must be images and their classes",
    ("image_classification", "model/head"): "an image has one class",
    ("", "model.topology"): "the objective is of another shape of model",
    ("", "model/head"): "the objective reads the scores of another head",
    ("", KIND): "the objective is made of other samples",
}


def objective_rules(name: str) -> list[Rule]:
    """What an objective's config declares, as rules, and what stands above."""
    config = TABLE["objective"][name].config
    declared = [(key, getattr(config, attribute, None)) for attribute, key in DECLARED.items()]
    made = [Rule({"objective": (name,)}, key, allowed, WHY.get((name, key), WHY["", key])) for key, allowed in declared if allowed is not None]
    return [*made, *(rule for rule in OBJECTIVE_RULES if rule.given["objective"] == (name,))]


def objectives_for(model: ModelConfig) -> list[str]:
    """The objectives that a model allows, on data of a kind that they read."""
    kinds = {name: getattr(option.config, "reads", None) or ALL_KINDS for name, option in TABLE["objective"].items()}
    return [name for name, reads in kinds.items() if any(_fits(model, name, kind) for kind in reads)]


def _fits(model: ModelConfig, objective: str, kind: str) -> bool:
    choices = {"model": model, "objective": _Option(objective), "data": _Option("any", kind)}
    return not any(rule.broken_by(choices) for rule in (*objective_rules(objective), *RUN_RULES))


def model_problems(model: ModelConfig) -> Iterator[str]:
    """What does not go together within a model; finished sentences."""
    choices = {"model": model}
    yield from (rule.sentence(choices) for rule in MODEL_RULES if rule.broken_by(choices))


def problems(config: Train) -> Iterator[str]:
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


# -------------------------------------------------------------------------------------------------------------------- values


def value_of(choices: Choices, key: str) -> Any:
    """The value at a key of the command line; of a group the option's name. None where the chosen option has no such knob."""
    value: Any = choices
    for part in key.replace("/", ".").split("."):
        value = value.get(part) if isinstance(value, Mapping) else getattr(value, part, None)
    return value.type if key in GROUPS else value


def _assignment(choices: Choices, key: str) -> str:
    return f"data={choices['data'].type}" if key == KIND else f"{key}={_text(value_of(choices, key))}"


def sources_of(kind: str) -> list[str]:
    """The options of `data` whose samples are of that kind; first those that need no path."""
    configs = {name: option.config for name, option in TABLE["data"].items() if getattr(option.config, "kind", None) == kind}
    return sorted(configs, key=lambda name: "path" in getattr(configs[name], "__dataclass_fields__", {}))


def _either(values: Sequence[Any]) -> str:
    return " or ".join(map(_text, values))


def _text(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


# -------------------------------------------------------------------------------------------------------------- documentation


def markdown() -> str:
    """The table as docs/axes.md shows it."""
    objectives = [
        (f"`{name}`", *(_listed(getattr(option.config, attribute, None)) for attribute in DECLARED)) for name, option in TABLE["objective"].items()
    ]
    kinds = dict.fromkeys(getattr(option.config, "kind", "text") for option in TABLE["data"].values())
    sources = [(kind, _listed(sources_of(kind))) for kind in kinds]
    rules = [(_conditions(rule), f"`{rule.key}`", _listed(rule.allowed), rule.why) for rule in (*MODEL_RULES, *OBJECTIVE_RULES, *RUN_RULES)]
    return "\n".join(
        (
            *_table(("objective", "`model.topology`", "`model/head`", "reads"), objectives),
            "",
            *_table(("samples", "`data`"), sources),
            "",
            *_table(("with", "the key", "must be", "because"), rules),
        )
    )


def _conditions(rule: Rule) -> str:
    return " and ".join(" or ".join(f"`{key}={_text(v)}`" if key != KIND else f"samples `{v}`" for v in values) for key, values in rule.given.items())


def _listed(values: Sequence[Any] | None) -> str:
    return "any" if values is None else ", ".join(f"`{_text(v)}`" for v in values)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]

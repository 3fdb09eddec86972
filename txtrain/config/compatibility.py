"""Which objective, model and data go together. docs/axes.md shows these rules and the model's own as a table. No torch.

The rules come from what each objective's config declares (`topologies`, `heads`, `reads`), and from the tables here.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterator

from txtrain.model.config import ModelConfig
from txtrain.model.rules import Choices, Rule
from txtrain.registry import TABLE
from txtrain.run_config import RunConfig

KIND = "data.sample_kind"
QUESTIONS = ("choices", "cloze", "questions")
_OF_TEXT = ("text", "chat", "preferences", "pairs", "problems", "labels", *QUESTIONS)
ALL_KINDS = (*_OF_TEXT, "images")


class RunRule(Rule):
    """A rule of a run, over the keys of the command line and KIND: the kind of a source's samples."""

    def broken_by(self, choices: Choices) -> bool:
        """What token files hold is known when they are opened: `txtrain.data.prepare` checks it then."""
        return super().broken_by(choices) and not (self.key == KIND and {*choices["data"].also} & {*self.allowed})

    def told(self, choices: Choices) -> tuple[str, str, str]:
        key, allowed, value = super().told(choices)
        return (
            (key, allowed, value)
            if key != KIND else ("data", f"a source of {allowed}", f"{choices['data'].type}, a source of {value},")
        )

    def assignment(self, choices: Choices, key: str) -> str:
        return super().assignment(choices, key) if key != KIND else f"data={choices['data'].type}"

    @property
    def nearest(self) -> str:
        return (
            super().nearest
            if self.key != KIND else f"data={', '.join(sources_of(self.allowed[0])[:1]) or 'a source of your own'}"
        )


RUN_RULES = (
    RunRule({KIND: ("images",)}, "model/embedding", ("patch",), "an image enters as patches"),
    RunRule({KIND: ("images",)}, "data.seq_len", (None,), "an image has as many positions as the model has patches"),
    RunRule({KIND: _OF_TEXT}, "model/embedding", ("token",), "text enters as tokens"),
)

OBJECTIVE_RULES = (
    *(
        RunRule({"objective": (name,)}, "model.mtp_depth", (0,), "causal_lm alone trains the MTP modules")
        for name in ("prefix_lm", "dpo", "distill", "grpo")
    ),
    RunRule(
        {"objective": ("prefix_lm",), "model.topology": ("encoder_decoder",)}, "data.packing", ("concat",),
        "the sequence is cut anywhere, padding would be on both sides"
    ),
    RunRule({"objective": ("span_corruption",)}, "data.packing", ("concat",), "padding would be corrupted too"),
)

# attribute of an objective's config -> the key that it restricts
DECLARED = {"topologies": "model.topology", "heads": "model/head", "reads": KIND}

WHY = {  # the last three: of a user's own objective
    ("causal_lm", "model.topology"): "each token is predicted from those before it, and an encoder has read them all",
    ("masked_lm", "model.topology"): "masked tokens are predicted from both sides, and a decoder sees one",
    ("span_corruption", "model.topology"): "the dropped spans are a sequence of their own, beside the text",
    ("prefix_lm", "model.topology"): "the rest is predicted token by token, and an encoder has read it all",
    ("seq2seq", "model.topology"): "a pair is read by one stack and written by another",
    ("seq2seq", KIND): "there must be a source and a target",
    ("sft", "model.topology"): "each token is predicted from those before it, and an encoder has read them all",
    ("sft", KIND): "there must be turns that are trained, and turns that are not",
    ("grpo", "model.topology"): "an answer is written token by token after its prompt",
    ("grpo", KIND): "there must be questions, and answers that can be checked",
    ("dpo", "model.topology"): "each token is predicted from those before it, and an encoder has read them all",
    ("dpo", KIND): "there must be two answers to each prompt, one of which is preferred",
    ("distill", "model.topology"): "each token is predicted from those before it, and an encoder has read them all",
    ("image_classification", KIND): "there must be images and their classes",
    ("image_classification", "model/head"): "an image has one class",
    ("classification", KIND): "there must be texts and their labels",
    ("classification", "model/head"): "a text has one result",
    ("", "model.topology"): "the objective is for another topology",
    ("", "model/head"): "the objective reads the output of another head",
    ("", KIND): "the objective needs other samples",
}


def objective_rules(name: str) -> list[Rule]:
    """The rules of an objective: what its config declares, and those of OBJECTIVE_RULES."""
    config = TABLE["objective"][name].config
    declared = [(key, getattr(config, attribute)) for attribute, key in DECLARED.items()]
    made = [
        RunRule({"objective": (name,)}, key, allowed, WHY.get((name, key), WHY["", key])) for key, allowed in declared
        if allowed is not None
    ]
    return [*made, *(rule for rule in OBJECTIVE_RULES if rule.given["objective"] == (name,))]


def objectives_for(model: ModelConfig) -> list[str]:
    """The objectives that fit a model, on data of a kind that they read; not those for evaluation alone."""
    training = {name: option.config for name, option in TABLE["objective"].items() if option.config.trains}
    kinds = {name: config.reads or ALL_KINDS for name, config in training.items()}
    return [name for name, reads in kinds.items() if any(fits(model, name, kind) for kind in reads)]


def fits(model: ModelConfig, objective: str, kind: str) -> bool:
    """Whether an objective can be that of a model, on data of that kind."""
    choices = {"model": model, "objective": _Option(objective), "data": _Option("any", kind)}
    return not any(rule.broken_by(choices) for rule in (*objective_rules(objective), *RUN_RULES))


def problems(config: RunConfig) -> Iterator[str]:
    """Conflicts between objective, model and data. If the model does not fit the objective, only that is reported."""
    choices = {"model": config.model, "objective": config.objective, "data": config.data}
    broken = [rule for rule in objective_rules(config.objective.type) if rule.broken_by(choices)]
    if broken and broken[0].key != KIND and (fitting := objectives_for(config.model)):
        yield broken[0].sentence(choices, nearest=_run_of(fitting[0], choices))
    else:
        yield from (rule.sentence(choices) for rule in (*broken, *RUN_RULES) if rule.broken_by(choices))


def _run_of(objective: str, choices: Choices) -> str:
    """`objective=masked_lm`, with `data=` if that must change too."""
    instead = dict(choices) | {"objective": _Option(objective)}
    return " ".join(
        [f"objective={objective}", *(rule.nearest for rule in objective_rules(objective) if rule.broken_by(instead))]
    )


@dc.dataclass(frozen=True)
class _Option:
    """The fields of an objective or a source that the rules read."""

    type: str
    sample_kind: str | None = None
    also: tuple[str, ...] = ()
    packing: str = "concat"
    seq_len: int | None = None


def sources_of(kind: str) -> list[str]:
    """The options of `data` with samples of that kind; those that need no path come first."""
    configs = {name: option.config for name, option in TABLE["data"].items() if option.config.sample_kind == kind}
    return sorted(configs, key=lambda name: any(f.name == "path" for f in dc.fields(configs[name])))

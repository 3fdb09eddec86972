"""One class of transformers as a table: config.json to ModelConfig and back, and the names of its tensors. No torch."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Collection, Mapping
from typing import Any

from txtrain.errors import ConfigError, hint
from txtrain.ground.convert import build
from txtrain.hf.describe import describe, differences
from txtrain.hf.fields import Part, short
from txtrain.hf.name_map import Row
from txtrain.model.config import ModelConfig
from txtrain.registry import MODEL_AXES, TABLE

# Fields of any class that say how to run, generate, classify or initialise, and do not change a forward.
_HARMLESS = """
    model_type architectures transformers_version _name_or_path name_or_path _commit_hash dtype torch_dtype use_cache
    return_dict output_attentions output_hidden_states output_scores return_dict_in_generate torchscript use_bfloat16
    tf_legacy_loss _attn_implementation attn_implementation _attn_implementation_autoset attn_implementation_internal
    gradient_checkpointing chunk_size_feed_forward pretraining_tp is_decoder tie_last_hidden_states
    cross_attention_hidden_size id2label label2id num_labels problem_type finetuning_task task_specific_params
    tokenizer_class prefix sep_token_id decoder_start_token_id max_length min_length max_new_tokens do_sample
    early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty
    length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences
    forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens cache_implementation is_llama_config _model_name_or_path unk_token_id mask_token_id
    cls_token_id max_sequence_length transformers.js_config unsloth_version unsloth_fixed
"""
HARMLESS = frozenset(_HARMLESS.split())

# Fields of any class that would change a forward, with the values that do not.
MUST_BE: dict[str, tuple[Any, ...]] = {
    "auto_map": (None,),  # the model's own code, which is never run
    "quantization_config": (None,), "is_encoder_decoder": (False, None), "add_cross_attention": (False, None),
    "tie_encoder_decoder": (False, None), "pruned_heads": ({}, None), "per_layer_config": ({}, None),
}

# config.json, the tensors' names, and whether two tensors are equal -> config.json
Settle = Callable[[Mapping[str, Any], Collection[str], Callable[[str, str], bool]], Mapping[str, Any]]


@dc.dataclass(frozen=True, kw_only=True)
class HFClass:
    """A class of transformers. A delta from another class is written with `dc.replace` and `without`."""

    architecture: str
    model_type: str
    family: str  # our label
    parts: tuple[Part, ...]
    defaults: Mapping[str, Any]  # the class's own; fields without a default must be given
    fixed: Mapping[str, Any]  # values of ours that the class always has, by dotted name
    rows: tuple[Row, ...]
    base: str  # prefix of the tensors of the class without a head; a folder may omit it
    must_be: Mapping[str, tuple[Any, ...]] = dc.field(default_factory=dict)  # in addition to MUST_BE
    harmless: str = ""  # in addition to HARMLESS
    buffers: str = r"(?!)"  # pattern of tensors in some folders that are not read; {n_layers}: the number of layers
    demands: Callable[[Mapping[str, Any]], str | None] = lambda model: None  # a reason of the class against a model
    is_of: Callable[[Mapping[str, Any]], bool] = lambda given: True  # whether the table describes this config.json
    marker: str | None = None  # a tensor without which a folder is of another class of the same model_type
    settled: Settle = lambda given, names, same: given  # corrects config.json by the tensors
    renamed: tuple[tuple[str, str], ...] = ()  # patterns of names in some folders, and the names in `rows`
    copies: Mapping[str, str] = dc.field(default_factory=dict)  # second names of tensors in some folders
    modules: tuple[tuple[str, str], ...] = ()  # patterns of modules' names in files, and the names in transformers 5
    stacks: tuple[Row, ...] = ()  # parameters of its modules that stack experts, which its files hold one by one
    sinusoids: str = r"(?!)"  # pattern of position tables in some folders, which are computed here

    def without(self, *names: str) -> HFClass:
        """The class without these fields of config.json."""
        parts = tuple(part for part in self.parts if part.names[0] not in names)
        gone = {name for part in self.parts if part not in parts for name in part.names}
        return dc.replace(self, parts=parts, defaults={n: v for n, v in self.defaults.items() if n not in gone})

    @property
    def loss_type(self) -> str | None:
        """transformers.Trainer's name of the class's loss. It counts the targets of the others unshifted."""
        return "ForCausalLM" if self.architecture.endswith("ForCausalLM") else None

    def read(self, given: Mapping[str, Any]) -> ModelConfig:
        """The model of a config.json.

        Raises:
            ConfigError: fields are wrong, missing, or neither known nor harmless; it names all of them.
        """
        problems = [*self._refused(given)]
        fields = {**self.defaults, **given}
        names = [name for part in self.parts for name in part.names]
        problems += [f"`{name}` must be given." for name in names if name not in fields]
        values = dict(self.fixed)
        for part in self.parts if not problems else ():
            try:
                values |= part.read(fields)
            except ConfigError as e:
                problems += e.problems
        if problems:
            raise ConfigError(*problems)
        return build(ModelConfig, _nested({"family": self.family, "size": "pretrained"} | values))

    def _refused(self, given: Mapping[str, Any]) -> list[str]:
        known = {name for part in self.parts for name in part.names} | self.defaults.keys()
        must_be, harmless = {**MUST_BE, **self.must_be}, HARMLESS | set(self.harmless.split())
        problems = []
        for name, value in given.items():
            if name in must_be:
                if not any(value == v and type(value) is type(v) for v in must_be[name]):
                    allowed = f"{' or '.join(map(_json, must_be[name]))}, but is {_json(value)} instead"
                    problems.append(f"`{name}` must be {allowed}: it changes the numbers, and is not supported.")
            elif name not in known and name not in harmless:
                why = f"it may change the numbers of {self.architecture}, and is not known"
                problems.append(f"`{name}` must not be given: {why}.{hint(name, sorted(known))}")
        return problems

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """The config.json of a model that the class equals (see `reasons_against`)."""
        described = describe(model)
        made: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type}
        for part in self.parts:
            made |= part.write(described)
        return made

    def reasons_against(self, model: ModelConfig) -> list[str]:
        """How the model differs from the class, field by field; none if it comes back unchanged from config.json."""
        if reasons := self.other_kinds(model):
            return reasons
        here = describe(model)
        if (demand := self.demands(here)) is not None:
            return [demand]
        try:
            there = describe(self.read(self.write(model)))
        except ConfigError as e:
            return [problem.rstrip(".") for problem in e.problems]
        names = differences(here, there)
        return [f"{name} is {_value(here.get(name))}, not {_value(there.get(name))}" for name in names]

    def other_kinds(self, model: ModelConfig) -> list[str]:
        """Axes, and the topology, of another kind than the class's; nothing else can be compared then."""
        kinds = {axis: TABLE[axis][self.fixed.get(f"{axis}.type", "mha")].target for axis in MODEL_AXES}
        chosen = {axis: getattr(model, axis).type for axis in kinds}
        reasons = [f"{axis} is {kind}" for axis, kind in chosen.items() if TABLE[axis][kind].target != kinds[axis]]
        same_topology = model.topology == self.fixed.get("topology", "decoder")
        return reasons if same_topology else [f"topology is {model.topology}", *reasons]

    def lost_dropouts(self, model: ModelConfig) -> list[str]:
        """Dropouts that the class has no field for: logits are equal, further training is not."""
        here, there = describe(model), describe(self.read(self.write(model)))
        return [f"{name} = {here[name]}" for name in differences(here, there, training=True)]


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for path, value in flat.items():
        *groups, last = path.split(".")
        here = made
        for group in groups:
            here = here.setdefault(group, {})
        here[last] = value
    return made


def _json(value: Any) -> str:
    words = {None: "absent", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else short(value)


def _value(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else "null" if value is None else str(value)

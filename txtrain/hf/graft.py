"""Any model as a folder with a modeling file of its own: its config.json, and what that file is to hold. No torch.

A part of HFClass's interface: the tensors have our names, and config.json has the model's configuration.
"""

from __future__ import annotations

import dataclasses as dc
import json
import textwrap
from collections.abc import Collection, Mapping
from typing import Any

from txtrain.errors import ConfigError
from txtrain.ground.convert import build
from txtrain.hf.class_fields import Classes
from txtrain.hf.fields import short
from txtrain.hf.hf_class import HFClass
from txtrain.hf.modeling.source import modeling_file, parameters
from txtrain.hf.name_map import Shape, Stored
from txtrain.hf.tensor_names import check_layers
from txtrain.model.config import ModelConfig
from txtrain.model.head.config import ClassHeadConfig, NoHeadConfig
from txtrain.registry import MODEL_AXES, TABLE, is_own

KIND = "txtrain"  # model_type, and the key of config.json that holds our configuration
FILE = f"modeling_{KIND}"
_FREE = ("architectures", "auto_map", "model_type", "id2label", "label2id", "vocab_size", "use_cache")
_CLASSES = ("head.n_classes", "head.label_names", "head.kind")
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


@dc.dataclass(frozen=True)
class Role:
    """What a model is to transformers: a class of its modeling file, and the Auto classes that load it.

    name: without what all have; empty: the model has no head.
    """

    name: str
    autos: tuple[str, ...]
    says: str


_CAUSAL = Role("CausalLM", ("CausalLM",), "Logits of the next token, [B, T, V].")
_SEQ2SEQ = Role("Seq2SeqLM", ("Seq2SeqLM",), "Logits of the answer's next token, [B, T, V].")
_MASKED = Role("MaskedLM", ("MaskedLM",), "Logits of the token at each position, [B, T, V].")
_PAIRS = Role("PreTraining", ("MaskedLM", "PreTraining"), f"{_MASKED.says[:-1]}; whether sentences follow, [B, 2].")
_TEXT = Role("SequenceClassification", ("SequenceClassification",), "A score for each class, [B, classes].")
_IMAGE = Role("ImageClassification", ("ImageClassification",), _TEXT.says)
_BODY = Role("", (), "")


def role_of(model: ModelConfig) -> Role:
    if isinstance(model.head, NoHeadConfig):
        return _BODY
    if isinstance(model.head, ClassHeadConfig):
        return _IMAGE if model.embedding.grid() else _TEXT
    if model.topology == "encoder":
        return _PAIRS if model.head.next_sentence else _MASKED
    return _CAUSAL if model.topology == "decoder" else _SEQ2SEQ


@dc.dataclass(frozen=True, kw_only=True)
class Graft(HFClass):
    """One model's own class."""

    role: Role
    model: ModelConfig

    @classmethod
    def of(cls, model: ModelConfig) -> Graft:
        """Raises:
        ConfigError: a part of the model is the user's own, of which the package knows no source.
        """
        for axis, component in model.components():
            if is_own(axis, component):
                what = "an option of txtrain, to be written into a modeling file"
                raise ConfigError(f"`model.{axis}` must be {what}, but {component.type} is your own.")
        role = role_of(model)
        name = f"For{role.name}" if role.name else "Model"
        return cls(
            architecture=f"Txtrain{name}", model_type=KIND, family=model.family, parts=(), defaults={}, fixed={},
            rows=(), base="", role=role, model=dc.replace(model, mtp_depth=0),
        )

    @classmethod
    def in_config(cls, given: Mapping[str, Any]) -> Graft:
        """The class of a config.json that was written here; its modeling file is not read.

        Raises:
            ConfigError: the configuration is missing or wrong, or a field that the modeling file reads differs from it.
        """
        ours = given.get(KIND)
        if not isinstance(ours, dict) or not isinstance(ours.get("model"), dict):
            raise ConfigError(f"`{KIND}.model` must be given: the configuration of the model, as txtrain writes it.")
        model = build(ModelConfig, ours["model"])
        check_layers(model, None, f"`{KIND}.model`")  # `write` goes through them
        theirs = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items() if name in _IDS}
        if type(n := given.get("vocab_size")) is int and model.vocab_size:
            theirs["vocab_size"] = n
        model = build(ModelConfig, {**model.to_dict(), **theirs})
        if isinstance(model.head, ClassHeadConfig) and "id2label" in given:
            named = Classes().read({
                "id2label": given["id2label"], "num_labels": model.head.n_classes, "problem_type": None,
            })
            model = dc.replace(model, head=dc.replace(model.head, label_names=named["head.label_names"]))
        made = cls.of(model)
        for name, value in made.write(model).items():
            if name in given and name not in (*_FREE, *_IDS, KIND) and given[name] != value:
                wanted = f"{short(value)}, as {KIND}.model says, but is {short(given[name])} instead"
                raise ConfigError(f"`{name}` must be {wanted}.")
        return made

    def read(self, given: Mapping[str, Any]) -> ModelConfig:
        return self.model

    def stored(self, model: ModelConfig, parameters: Mapping[str, Shape]) -> list[Stored]:
        return [Stored(name, (name,), shape, transposed=False) for name, shape in parameters.items()]

    def lost_dropouts(self, model: ModelConfig) -> list[str]:
        return []

    def write(self, model: ModelConfig) -> dict[str, Any]:
        model = dc.replace(model, mtp_depth=0)
        has, two_stacks = features(model), model.topology == "encoder_decoder"
        autos = {"AutoConfig": "Config", "AutoModel": "Model"}
        autos |= {f"AutoModelFor{auto}": f"For{self.role.name}" for auto in self.role.autos}
        made: dict[str, Any] = {
            "architectures": [self.architecture],
            "auto_map": {auto: f"{FILE}.Txtrain{name}" for auto, name in autos.items()},
            "model_type": KIND,
            "vocab_size": model.vocab_size, "hidden_size": model.dim, "num_hidden_layers": model.n_layers,
            **({"num_encoder_layers": model.encoder_layers} if two_stacks else {}),
            "num_attention_heads": model.n_heads, "max_position_embeddings": model.max_seq_len,
            "dropout": model.dropout, "output_dropout": model.output_dropout, "initializer_range": model.init.std,
            **components(model, has),
            "tie_word_embeddings": model.tie_word_embeddings, "is_encoder_decoder": two_stacks,
        }
        for name in _IDS[:3]:
            value = getattr(model, name)
            made[name] = list(value) if isinstance(value, tuple) else value
        if two_stacks:
            start = model.decoder_start_token_id
            made["decoder_start_token_id"] = (model.pad_token_id or 0) if start is None else start
        if isinstance(model.head, ClassHeadConfig):
            made |= Classes().write({name: getattr(model.head, name.removeprefix("head.")) for name in _CLASSES})
        made[KIND] = {"model": model.to_dict()}
        plain: dict[str, Any] = json.loads(json.dumps(made))
        return plain

    def code(self) -> dict[str, str]:
        """Name -> content of the modeling file."""
        model, has = self.model, features(self.model)
        drawn = ["nn.Linear", "nn.Conv2d"] if "patch" in has else ["nn.Linear"]
        drawn += [] if "patch" in has and "grid" not in has else ["nn.Embedding"]
        drawn += ["LMHead"] if "vocabulary" in has else []
        drawn += ["Experts"] if "mixture" in has else []
        bases = "TxtrainPreTrainedModel, GenerationMixin" if "generates" in has else "TxtrainPreTrainedModel"
        legend = (", C latent size, P and R parts of a head without and with rotation" if "latent" in has else "") + (
            ", E experts" if "mixture" in has else ""
        )
        words = {
            "summary": "\n".join(textwrap.wrap(f"{described(model)}.", 117)),  # behind three quotes
            "auto": f"AutoModelFor{self.role.autos[0]}" if self.role.autos else "AutoModel",
            "Class": self.architecture, "bases": bases, "class_doc": self.role.says, "legend": legend,
            "Norm": _target("norm", model.norm), "Attention": _target("attention", model.attention),
            "Position": _target("position", model.position), "FFN": _target("ffn", model.ffn),
            "Residual": _target("norm_position", model.residual), "Embedding": _target("embedding", model.embedding),
            "drawn": ", ".join(drawn), "causal": str(model.topology != "encoder"),
            "vocab": "" if "patch" in has else "config.vocab_size, ",
            "rope_scaling": _scaling(model),
        }
        functions = {model.ffn.activation, *([model.head.activation] if "masked_lm" in has else [])}
        return {f"{FILE}.py": modeling_file(has, words, " ".join(sorted(functions)))}


def described(model: ModelConfig) -> str:
    """The model in a few words."""
    kinds = {"decoder": "A decoder", "encoder": "An encoder", "encoder_decoder": "An encoder and a decoder"}
    axes = ", ".join(f"{axis} {getattr(model, axis).type}" for axis in ("attention", "ffn", "position", "norm"))
    return f"{kinds[model.topology]}: {axes}, norm position {model.norm_position}, head {model.head.type}"


def _target(axis: str, component: Any) -> str:
    return str(TABLE[axis][component.type].target).partition(":")[2]


def features(model: ModelConfig) -> frozenset[str]:
    """The names of the template that apply."""
    attention, ffn = model.attention, model.ffn
    position, head = _target("position", model.position), _target("head", model.head)
    two_stacks, layers = model.topology == "encoder_decoder", range(max(model.n_layers, model.encoder_layers))
    mixture, patch = bool(ffn.n_experts), model.embedding.grid() is not None
    latent = _target("attention", attention) == "LatentAttention"
    own_matrix = not model.tie_word_embeddings
    generates = head == "LMHead" and model.topology != "encoder"
    found = {
        "two_stacks": two_stacks, "patch": patch, "token": not patch, "types": bool(model.embedding.n_types),
        "embedding_norm": model.embedding.norm, "final_norm": model.has_final_norm,
        "own_encoder_embedding": two_stacks and not model.share_embeddings,
        "rope": position == "RoPE", "rope_scaling": bool(_scaling(model)),
        "by_length": model.position.scaling is not None and model.position.scaling.by_length,
        "bias": position in ("RelativeBias", "ALiBi"), "relative": position == "RelativeBias",
        "grid": patch and position == "Learned",
        "windows": any(attention.window_at(i) is not None for i in layers), "softcap": attention.softcap is not None,
        "latent": latent, "generates": generates, "latent_cache": latent and generates,
        "mixture": mixture, "dense_layers": mixture and bool(ffn.dense_layers),
        "aux": mixture and bool(ffn.aux_weight), "balance_bias": mixture and bool(ffn.bias_update_rate),
        "headed": head != "NoHead", "kept_pooler": head == "NoHead" and model.head.pooler,
        "vocabulary": head in ("LMHead", "MLMHead"), "classifier": head == "ClassHead",
        "text_classifier": head == "ClassHead" and not patch, "masked_lm": head == "MLMHead",
        "next_sentence": model.head.next_sentence,
        "fixed_vocabulary": head == "MLMHead" or (head == "LMHead" and (own_matrix or model.head.bias)),
    }
    found["plainly"] = not found["bias"] and not found["softcap"]
    return frozenset(name for name, applies in found.items() if applies)


def components(model: ModelConfig, has: Collection[str]) -> dict[str, Any]:
    """The arguments of each component's class; those that its caller gives, or that differ by layer, stand apart."""
    layers = range(max(model.n_layers, model.encoder_layers))
    apart = {
        "attention": ("window",), "ffn": ("dense_hidden_dim",), "embedding": ("vocab_size",),
        "head": ("vocab_size", "n_classes", "lm"), "position": ("causal",), "norm": (),
    }
    made: dict[str, Any] = {}
    for axis in MODEL_AXES:
        component = getattr(model, axis)
        arguments = component.arguments(model, model.n_layers - 1)  # of a mixture's layers the last is one
        if axis == "position":
            asked = parameters(_target(axis, component))
            arguments |= {n: getattr(model, n) for n in ("dim", "n_heads", "max_seq_len") if n in asked}
        if axis == "position" and "grid" not in has:
            arguments.pop("grid", None)
        made[axis] = {n: _value(v) for n, v in arguments.items() if n not in apart[axis]}
    if "windows" in has:
        made["windows"] = [model.attention.window_at(i) for i in layers]
    if "dense_layers" in has:
        made |= {"dense_layers": model.ffn.dense_layers, "dense_hidden_dim": model.ffn.dense_width(model)}
    return made


def _scaling(model: ModelConfig) -> str:
    """The name of the function of frequencies; empty where they are not scaled, or by another base alone."""
    scaling = model.position.arguments(model).get("scaling")
    return "" if scaling is None else str(TABLE["rope_scaling"][scaling.rope_type].target).partition(":")[2]


def _value(value: Any) -> Any:
    """A scaling of rotations with what its class says of it, as a dictionary."""
    if not dc.is_dataclass(value):
        return value
    said = {name: getattr(value, name) for name in dir(value) if not name.startswith("_")}
    return {name: v for name, v in said.items() if not callable(v)}

"""The modeling file of a model that no class of transformers equals, as text. No torch.

The components (norms, attention, FFNs, positions, embeddings, heads) are those of txtrain/model, copied as text: what
computes here and there is one source. `modeling.template` is what surrounds them in transformers: the configuration,
masks and caches, the stack, the classes that the Auto classes load. Of both, only what this model uses is written.

    #: if NAME / if not NAME / else / end     lines for models with that feature
    #: source MODULE                          the definitions of txtrain/model/MODULE that are used
    #: forward, #: forward_head               the signature of a forward
    $name                                     a word of the model: `words`
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from string import Template

HERE = Path(__file__).parent
MODEL = HERE.parent.parent / "model"
MODULES = (
    "norm.norms", "norm.placement", "position.encodings", "attention.multi_head", "attention.latent", "ffn.dense",
    "ffn.moe", "embedding.embeddings", "head.loss", "head.heads",
)
WIDTH = 120

# Members of classes that only txtrain uses: initialisation by family, the loss by chunks, ranks.
_LEFT_OUT = {
    "Head": ("loss", "log_probs", "check_labels"),
    "LMHead": ("vocabulary", "loss", "log_probs", "multiplied", "distilled", "chunked"),
    "MLMHead": ("loss",), "ClassHead": ("check_labels", "token_loss"), "NoHead": ("forward", "check_labels"),
    "TokenEmbedding": ("n_channels",), "Learned": ("takes", "from_table"),
}
_LEFT_OUT_EVERYWHERE = ("residual_projections", "stacked_projections")

# Words that mean something in txtrain alone.
_SAID_THERE = {
    r"\bConfigError\b": "ValueError", r"the scalings of `config\.RoPEScalingConfig`": "its scalings",
    r"\b[A-Z]\w*Scaling(Config)?\b": "SimpleNamespace", r"see mask\.py": "see `Mask`",
    r"see balancing\.py": "in txtrain", r"model\.embedding\.n_types": "n_types",
    r"\bmatrix\((self\.\w+)\)": r"\1.weight",  # there with an adapter's product
    r"\bkind: Kind\b": "kind: str",
    r"\bgated\(self\.act, (.+\)), (self\..+\))\)": r"self.act(\1) * \2",
    r"\bfused\.rms_norm\(": "F.rms_norm(",
    # The auxiliary loss of GPT-1 (model.head.lm) stays behind.
    r"(?<=dim: int, )vocab_size: int, (?=n_classes)": "", r"(?<=kind: str), lm: bool,": ",",
    r"(?<=regression), as `class_loss`\. lm: .*": ", as `class_loss`.", r"\n.*self\.next_token = .*": "",
}
_IMPORTS = {
    "math": "import math", "torch": "import torch", "F": "import torch.nn.functional as F",
    "Callable": "from collections.abc import Callable", "dataclass": "from dataclasses import dataclass",
    "partial": "from functools import partial", "lru_cache": "from functools import lru_cache",
    "SimpleNamespace": "from types import SimpleNamespace",
    **{name: f"from typing import {name}" for name in ("Any", "NamedTuple", "NoReturn")},
    "Tensor": "from torch import Tensor", "nn": "from torch import nn",
    **{name: f"from transformers import {name}" for name in ("GenerationMixin", "PretrainedConfig", "PreTrainedModel")},
    "__version__": "from transformers import __version__",
    **{n: f"from transformers.cache_utils import {n}" for n in ("Cache", "DynamicCache", "EncoderDecoderCache")},
    "GradientCheckpointingLayer": "from transformers.modeling_layers import GradientCheckpointingLayer",
    "BaseModelOutput": "from transformers.modeling_outputs import BaseModelOutput",
    "ModelOutput": "from transformers.utils import ModelOutput",
}


def modeling_file(features: Collection[str], words: Mapping[str, str], activation: str | None) -> str:
    """The text of the file.

    Args:
        features: those of the template's names that apply.
        words: for `$name` in the template.
        activation: names the functions of `ACTIVATIONS` that are used, with spaces between.
    """
    text = "\n".join(_chosen((HERE / "modeling.template").read_text(encoding="utf-8").splitlines(), features))
    text = Template(_with_forwards(text, features)).safe_substitute(
        words, given=_given(features), activations=_activations((activation or "").split())
    )
    tree = ast.parse(re.sub(r"^\$imports$", "", text, flags=re.M))
    own = {name for node in tree.body for name in _named(node)}
    names = _names(tree)
    used = _closure(names, own)
    for module in MODULES:
        names = names.union(*(found for name, found in _uses(module).items() if name in used and name not in own))
        parts = [part for name, part in definitions(module).items() if name in used and name not in own]
        text = text.replace(f"#: source {module}", "\n\n\n".join(parts))
    text = text.replace("AnyContext", "Context | CrossContext" if "two_stacks" in features else "Context")
    return _tidy(text.replace("$imports", _imports(names)))


def _chosen(lines: list[str], features: Collection[str]) -> Iterator[str]:
    """The lines that apply."""
    open_: list[bool] = []
    for line in lines:
        match line.removeprefix("#: ").split() if line.startswith("#: ") else ():
            case ("if", "not", name):
                open_.append(name not in features)
            case ("if", name):
                open_.append(name in features)
            case ("else",):
                open_[-1] = not open_[-1]
            case ("end",):
                open_.pop()
            case _:
                if all(open_):
                    yield line
    assert not open_, "an `if` of the template has no `end`"


# ----------------------------------------------------------------------------------------------------- our definitions


@lru_cache
def definitions(module: str) -> dict[str, str]:
    """Each class, function and constant of a module of the model, as text."""
    path = MODEL.joinpath(*module.split(".")).with_suffix(".py")
    text = path.read_text(encoding="utf-8")
    lines, found = text.splitlines(), dict[str, str]()
    for node in ast.parse(text).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            found[node.name] = _said_here(_text(lines, node, _left_out(node)))
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = _said_here(_text(lines, node))
    return found


def _left_out(node: ast.ClassDef | ast.FunctionDef) -> set[int]:
    """The lines of members that are not copied, and the empty ones after them."""
    names = (*_LEFT_OUT.get(node.name, ()), *_LEFT_OUT_EVERYWHERE)
    lines: set[int] = set()
    members = node.body if isinstance(node, ast.ClassDef) else []
    for i, member in enumerate(members):
        if not _named(member).isdisjoint(names):
            following = members[i + 1] if i + 1 < len(members) else None
            last = node.end_lineno or 0 if following is None else _first(following) - 1
            lines |= set(range(_first(member), last + 1))
    return lines


def _named(node: ast.stmt) -> set[str]:
    """What a statement of a class or a module defines."""
    if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else ()
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _first(node: ast.stmt) -> int:
    decorators = node.decorator_list if isinstance(node, (ast.ClassDef, ast.FunctionDef)) else []
    return min([node.lineno, *(d.lineno for d in decorators)])


def _text(lines: list[str], node: ast.stmt, without: Collection[int] = ()) -> str:
    numbers = range(_first(node), (node.end_lineno or node.lineno) + 1)
    return "\n".join(lines[i - 1] for i in numbers if i not in without).rstrip()


def _said_here(text: str) -> str:
    for there, here in _SAID_THERE.items():
        text = re.sub(there, here, text)
    return text


@lru_cache
def parameters(name: str) -> list[str]:
    """The names of the parameters of one of our classes."""
    text = next(found[name] for found in map(definitions, MODULES) if name in found)
    (cls,) = ast.parse(text).body
    assert isinstance(cls, ast.ClassDef)
    init = [node for node in cls.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
    return [arg.arg for node in init for arg in node.args.args]


def _closure(names: set[str], own: Collection[str]) -> set[str]:
    """The names, and those that our definitions of them use."""
    uses = {name: names for module in MODULES for name, names in _uses(module).items()}
    found: set[str] = set()
    waiting = {name for name in names if name in uses}
    while waiting:
        name = waiting.pop()
        found.add(name)
        waiting |= {n for n in uses[name] if n in uses and n not in own} - found
    return found


@lru_cache
def _uses(module: str) -> dict[str, set[str]]:
    """The names in each definition of a module."""
    return {name: _names(ast.parse(text)) for name, text in definitions(module).items()}


def _names(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def _activations(names: list[str]) -> str:
    """`ACTIVATIONS` with the functions that are used."""
    source = (MODEL / "ffn" / "dense.py").read_text(encoding="utf-8")
    entries = dict(re.findall(r'"(\w+)": ([\w.]+)', source.partition("\nACTIVATIONS: ")[2].partition("}")[0]))
    chosen = ", ".join(f'"{name}": {entries[name]}' for name in names)
    ours = definitions("ffn.dense")
    table = f"ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {{{chosen}}}" if names else ""
    return "\n\n\n".join([*(ours[entries[name]] for name in names if entries[name] in ours), table])


# ------------------------------------------------------------------------------------------------------------- forwards


def _arguments(features: Collection[str], head: bool) -> list[str]:
    """Of a forward, as transformers names them: its trainer, collators and `generate` go by these names."""
    tensor = "Tensor | None = None"
    if "patch" in features:
        made = [f"pixel_values: {tensor}"]
    else:
        made = [f"input_ids: {tensor}", f"attention_mask: {tensor}"]
        made += [f"position_ids: {tensor}"] if "two_stacks" not in features else []
        made += [f"token_type_ids: {tensor}"] if "types" in features else []
        made += [f"inputs_embeds: {tensor}"]
    if "two_stacks" in features:
        made += [f"decoder_input_ids: {tensor}", f"decoder_attention_mask: {tensor}"]
        made += ["encoder_outputs: BaseModelOutput | None = None"]
    if "generates" in features:
        made += ["cache: Cache | None = None", "past_key_values: Cache | None = None", "use_cache: bool | None = None"]
    if head:
        made += [f"labels: {tensor}"] + ([f"next_sentence_label: {tensor}"] if "next_sentence" in features else [])
        made += ["num_items_in_batch: Tensor | int | None = None"]
        made += ["logits_to_keep: int | Tensor = 0"] if "classifier" not in features else []
    return [*made, "output_hidden_states: bool | None = None", "**kwargs: Any"]


def _given(features: Collection[str]) -> str:
    """What `forward` hands to `read`."""
    cache = ["past_key_values if cache is None else cache", "use_cache"] if "generates" in features else []
    types = ["token_type_ids"] if "types" in features else []
    if "patch" in features:
        given = ["pixel_values"]
    elif "two_stacks" in features:
        given = ["input_ids", "attention_mask", "inputs_embeds", "decoder_input_ids", "decoder_attention_mask"]
        given += ["encoder_outputs", *cache, *types]
    else:
        given = ["input_ids", "attention_mask", "position_ids", "inputs_embeds", *types, *cache]
    inner = textwrap.indent(_filled(given), " " * 12)
    return f"\n{inner}\n        "


def _with_forwards(text: str, features: Collection[str]) -> str:
    for mark, head in (("#: forward_head", True), ("#: forward", False)):
        signature = textwrap.indent(_filled(["self", *_arguments(features, head)]), " " * 8)
        made = f"    def forward(\n{signature},\n    ) -> Output:"
        if head and "two_stacks" in features:
            answer = "input_ids" if "classifier" in features else "labels"  # for a class the decoder reads the source
            made += (
                f"\n        if decoder_input_ids is None and {answer} is not None:"
                f"\n            decoder_input_ids = self.prepare_decoder_input_ids_from_labels({answer})"
            )
            if "aux" in features or "by_length" in features:
                up_to_last = "(labels != -100).flip(1).cumsum(1).flip(1) > 0"
                mask = "attention_mask" if "classifier" in features else up_to_last
                made += "\n            if decoder_attention_mask is None:"
                made += f"\n                decoder_attention_mask = {mask}"
        text = "\n".join(made if line == mark else line for line in text.split("\n"))
    return text


def _filled(items: list[str]) -> str:
    """Items with commas between, in lines of the usual width."""
    lines, width = [""], WIDTH - 14
    for item in items:
        if lines[-1] and len(lines[-1]) + len(item) + 2 > width:
            lines.append("")
        lines[-1] += f", {item}" if lines[-1] else item
    return ",\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------- tidy


def _imports(names: set[str]) -> str:
    groups: list[list[str]] = [[], []]
    members: dict[str, list[str]] = {}
    for name, line in _IMPORTS.items():
        if name not in names:
            continue
        module = line.split()[1]
        group = groups["torch" in module or "transformers" in module]
        if line.startswith("from"):
            members.setdefault(module, []).append(name)
        else:
            group.append(line)
    for module, found in members.items():
        groups["torch" in module or "transformers" in module].append(
            f"from {module} import {', '.join(sorted(found, key=lambda name: (name.islower(), name.lower())))}"
        )
    for group in groups:
        group.sort(key=lambda line: (not line.startswith("import"), line))
    return "\n\n".join("\n".join(group) for group in groups if group)


def _tidy(text: str) -> str:
    """Two empty lines around classes and functions; no title without content."""
    text = re.sub(r"[ \t]+$", "", text, flags=re.M)
    text = re.sub(r"(?<=\n)\n+(?=    def |    @)", "\n", text)  # members
    lines, nodes = text.splitlines(), ast.parse(text).body
    made, end, before = list[str](), 0, nodes[0]
    for node in nodes:
        above = [line for line in lines[end : _first(node) - 1] if line]  # comments
        titles = [i for i, line in enumerate(above) if line.startswith("# ----")]
        above = above[titles[-1] :] if titles else above
        large = isinstance(node, _LARGE) or isinstance(before, _LARGE) or bool(titles)
        joined = isinstance(before, _IMPORT) and isinstance(node, _IMPORT) and lines[_first(node) - 2] != ""
        large = large and not _is_future(node)
        gap = "\n\n\n" if large else "\n" if joined else "\n\n"
        above += [""] if above and _is_future(node) else []
        comments = "".join(f"{line}\n" + ("\n" * (1 + large) if line.startswith("# ----") else "") for line in above)
        last = node.end_lineno or 0
        made.append((gap if made else "") + comments + "\n".join(lines[_first(node) - 1 : last]))
        end, before = last, node
    return "".join(made) + "\n"


def _is_future(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


_LARGE = (ast.ClassDef, ast.FunctionDef)
_IMPORT = (ast.Import, ast.ImportFrom)

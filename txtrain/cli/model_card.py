"""The README.md of an exported model: what it is, its data, its figures, how; the licence is the user's to say."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from txtrain.config.schema_of_trained import Export
from txtrain.ground import plain_files
from txtrain.monitor import metrics_csv

_FIGURES = ("step", "tokens", "loss", "val_loss", "perplexity", "bits_per_byte", "accuracy")  # of metrics.csv
_PLACES = ("run_dir", "resume", "imports", "name", "fork", "hydra")
_AUTO = {  # the end of a class's name -> the class that loads it
    "ForCausalLM": "AutoModelForCausalLM", "LMHeadModel": "AutoModelForCausalLM", "Seq2SeqLM": "AutoModelForSeq2SeqLM",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM", "MTModel": "AutoModelForSeq2SeqLM",
    "ForMaskedLM": "AutoModelForMaskedLM", "ForPreTraining": "AutoModelForPreTraining",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForImageClassification": "AutoModelForImageClassification",
}


def card(checkpoint: Path, architecture: str, config: Mapping[str, Any], export: Export) -> str:
    """The text. checkpoint: of a run, or a folder without one, of which less is known."""
    run = next((p for p in checkpoint.parents if (p / "run.json").is_file()), None)
    facts = {} if run is None else plain_files.read_json(run / "run.json")
    own_code = "auto_map" in config
    auto = next((auto for end, auto in _AUTO.items() if architecture.endswith(end)), "AutoModel")
    trust = ", trust_remote_code=True" if own_code else ""
    lines = [
        "---", "library_name: transformers", "license: other  # FILL IN: the licence of this model", "tags: [txtrain]",
        "---", "", f"# {_word(facts.get('name') or checkpoint.name)}", "", "Trained with txtrain.", "",
        "## What it is", "", *_table(_what(architecture, config, facts, export)), "",
    ]
    if export.format == "gguf":
        lines += ["```bash", "llama-cli -m *.gguf", "```", ""]
    else:
        lines += [
            "```python", f"from transformers import {auto}", "",
            f'model = {auto}.from_pretrained("FOLDER"{trust})', "```", "",
        ]
    if data := facts.get("data"):
        lines += ["## Data", "", *_table(_plain(data) if isinstance(data, dict) else {}), ""]
    if figures := {} if run is None else _figures(run / "metrics.csv"):
        lines += ["## Figures", "", *_table(figures), ""]
    if run is not None:
        lines += ["## How", "", "```bash", _command(facts.get("given"), checkpoint / "config.yaml"), "```", ""]
        lines += [*_table(_how(facts, checkpoint, export)), ""]
    lines += ["## Licence", "", "FILL IN: the licence of this model, and that of its data.", ""]
    return "\n".join(lines)


def _what(
    architecture: str, config: Mapping[str, Any], facts: Mapping[str, Any], export: Export
) -> dict[str, Any]:
    own = config.get("txtrain", {}).get("model", {}) if "auto_map" in config else {}
    axes = {
        axis: own[axis]["type"] for axis in ("attention", "ffn", "position", "norm", "head") if axis in own
    } | ({"norm position": own["norm_position"]} if own else {})
    made = {"class": architecture, "parameters": facts.get("parameters"), "dtype": export.dtype, **axes}
    grafts = facts.get("grafts")
    return {**made, **({"grafts": json.dumps(grafts)} if grafts else {})}


def _how(facts: Mapping[str, Any], checkpoint: Path, export: Export) -> dict[str, Any]:
    hardware, versions = facts.get("hardware"), facts.get("versions")
    made = {
        "checkpoint": checkpoint.name, "weights": export.weights, "git commit": facts.get("git_commit"),
        "data order": facts.get("data_order_hash"),
    }
    made |= {f"hardware: {name}": v for name, v in _plain(hardware).items() if name in ("device", "processes")}
    return {**made, **{f"version: {name}": v for name, v in _plain(versions).items()}}


def _plain(value: object) -> dict[str, Any]:
    return {str(k): v for k, v in value.items() if not isinstance(v, (dict, list))} if isinstance(value, dict) else {}


def _command(given: object, path: Path) -> str:
    """The run's command: the keys that were given, with their values; where it was written is nobody's business."""
    config: Any = plain_files.read_yaml(path) if path.is_file() else {}
    words = ["txtrain"]
    for key in given if isinstance(given, list) else ():
        if str(key).partition(".")[0] not in _PLACES:
            value: Any = config
            for part in str(key).replace("/", ".").split("."):
                value = value.get(part) if isinstance(value, dict) else None
            if isinstance(value, dict):
                value = value.get("family" if key == "model" else "type")
            if value is not None:
                words.append(_word(f"{key}={json.dumps(value) if not isinstance(value, str) else value}"))
    return shlex.join(words)


def _figures(path: Path) -> dict[str, str]:
    """The last value of each column."""
    rows = metrics_csv.read(path)
    found = {name: [row[name] for row in rows if row.get(name)] for name in _FIGURES}
    return {name: _number(values[-1]) for name, values in found.items() if values}


def _number(text: str) -> str:
    if text.isdecimal():
        return f"{int(text):,}"
    value = float(text)
    return f"{value:.1e}" if 0 < abs(value) < 0.001 else f"{value:.4f}"


def _table(values: Mapping[str, Any]) -> list[str]:
    rows = [
        f"| {_word(name)} | {f'{v:,}' if type(v) is int else _word(v)} |"
        for name, v in values.items() if v not in (None, "")
    ]
    return ["| | |", "|---|---|", *rows]


def _word(value: object) -> str:
    """In one line of Markdown, whatever a folder says of itself."""
    return " ".join(str(value).replace("|", "/").replace("`", "'").replace("<", "&lt;").split())[:300]

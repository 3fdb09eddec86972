"""Exports of models that no class of transformers equals: loaded where txtrain cannot be imported, they equal ours."""

import dataclasses as dc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.draws import LEGAL_HEADS, legal_models
from tests.models import attentions, ffns, ids, norms, positions, seeded, shake
from txtrain.cli.jobs import compose
from txtrain.hf import save
from txtrain.hf.graft import Graft, role_of
from txtrain.hf.registry import Leaving
from txtrain.model.config import ModelConfig
from txtrain.model.generation import generate
from txtrain.model.transformer import Transformer
from txtrain.registry import MODEL_AXES, TABLE, is_own

HERE = Path(__file__).parent
N_DEFAULT, N_SLOW = 200, int(os.environ.get("TXTRAIN_GRAFTS", "1000"))
OTHER = os.environ.get("TXTRAIN_TRANSFORMERS")  # a folder with another version of transformers
NEW = 6  # tokens of a text


@st.composite
def grafts_of_the_transformer(draw: st.DrawFn) -> ModelConfig:
    """The default Transformer, small, with one or two other parts."""
    axes = {"attention": attentions, "ffn": ffns, "position": positions, "norm": norms, "norm_position": st.sampled_from(sorted(TABLE["norm_position"]))}
    chosen = draw(st.lists(st.sampled_from(sorted(axes)), min_size=1, max_size=2, unique=True))
    return dc.replace(the_transformer(), **{axis: draw(axes[axis]) for axis in chosen})


@lru_cache
def the_transformer() -> ModelConfig:
    small = ("model.dim=32", "model.n_heads=4", "model.vocab_size=61", "model.max_seq_len=48", "model.dropout=0")
    return compose(["model=transformer", *small]).model


def drawn(n: int) -> list[ModelConfig]:
    """The first n of a fixed sequence of legal models, about every tenth of them a graft of the default Transformer."""
    legal = grafts_of_the_transformer().filter(lambda config: not list(config.check()))
    of_transformer = distinct(legal, -(-n // 10))
    made = [*of_transformer, *distinct(legal_models, n - len(of_transformer))]
    return [of_every_kind(config, i) for i, config in enumerate(made)]


def distinct(models: st.SearchStrategy[ModelConfig], n: int) -> list[ModelConfig]:
    found: list[ModelConfig] = []

    @settings(max_examples=4 * n, database=None, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(models)
    def collect(config: ModelConfig) -> None:
        saturated = config.norm.type == "none" and config.logit_softcap is not None  # logits of exactly the cap: ties, no gradient
        if config not in found and not saturated:
            found.append(config)

    collect()
    step = max(1, len(found) // n)
    return found[::step][:n]


def of_every_kind(config: ModelConfig, i: int) -> ModelConfig:
    """With a head of classes: one class, several and numbers in turn, with and without its parts."""
    if config.head.type != "class":
        return config
    kind = ("single", "multi", "regression")[i % 3]
    lm = config.topology == "decoder" and config.tie_word_embeddings
    head = dc.replace(
        config.head, kind=kind, n_classes=1 if kind == "regression" and i % 2 else 10, pooler=(None, True, False)[i // 3 % 3],
        bias=(None, True, False)[i // 2 % 3], lm=lm,
    )
    return dc.replace(config, head=head, pad_token_id=int(ids(2, 12)[1, -1]) if config.vocab_size else None)


def write_case(config: ModelConfig, folder: Path, seed: int, trainer: bool = False) -> None:
    """An export, and what our model says for some inputs."""
    model = shake(seeded(config, seed)).eval()
    folder.mkdir(parents=True)
    hf = Graft.of(config)
    saved = save.Saved.of(model, save.tensors_of(model))
    dc.replace(saved, leaving=Leaving(hf, config), tensors=save.tensors_of(model)).write(folder)
    model.mtp = torch.nn.ModuleList()  # stays behind; the balance of its experts would send a gradient into the trunk here
    inputs, decoder, case = _inputs(config), {}, {"auto": f"AutoModelFor{role_of(config).autos[0]}"}
    if config.topology == "encoder_decoder":
        again = config.head.type == "class"  # its decoder reads the source
        decoder = {"decoder_input_ids": model.shifted_right(inputs["input_ids"]) if again else ids(2, 7, seed=3)}
    case |= {"inputs": inputs, "decoder": decoder, "trainer": trainer}
    if "input_ids" in inputs:
        mask = torch.ones(2, 12, dtype=torch.long)
        mask[1, 8:] = 0
        left = config.topology == "decoder"
        case["padded"] = {"input_ids": inputs["input_ids"], "attention_mask": mask.flip(1) if left else mask}
        whole = role_of(config).name in ("Seq2SeqLM", "SequenceClassification")
        case["real"] = torch.ones(2, dtype=torch.bool) if whole else case["padded"]["attention_mask"].bool()
    for dtype in (torch.float32, torch.float64):
        case[str(dtype).removeprefix("torch.")] = _record(model.to(dtype), case)
    if case["auto"] in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM"):
        prompt, mask = ids(2, 9, seed=5), torch.ones(2, 9, dtype=torch.long)
        if config.topology == "encoder_decoder":
            mask[1, 5:] = 0  # transformers counts an encoder's positions from the first column, padding or not
        else:
            mask[1, :4] = 0
        case |= {"prompt": prompt, "prompt_mask": mask, "new": NEW}
        text = generate(model, prompt, mask, NEW, eos_token_id=None)
        if config.topology == "encoder_decoder":
            case["text"] = text
        else:
            case["text"] = torch.cat((prompt, text[:, 9:]), dim=1)
    torch.save(case, folder / "case.pt")


def _inputs(config: ModelConfig) -> dict[str, Tensor]:
    if config.embedding.type == "patch":
        pixels = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(4))
        return {"pixel_values": pixels, "labels": _classes(config)}
    made = {"input_ids": ids(2, 12)}
    if config.head.type == "class":
        return made | {"labels": _classes(config)}
    labels = ids(2, 12 if config.topology != "encoder_decoder" else 7, seed=2)
    labels[0, :3] = -100
    made["labels"] = labels
    if config.embedding.n_types:
        made["token_type_ids"] = (torch.arange(12) > 5).long().expand(2, -1)
    if config.head.next_sentence:
        labels[1, 5:8] = -100  # as many words in each row: a part of a batch weighs its sentences by its words
        made["next_sentence_label"] = torch.tensor([0, 1])
    return made


def _classes(config: ModelConfig) -> Tensor:
    """Labels of two rows."""
    kind, n = config.head.kind, config.head.n_classes
    if kind == "single":
        return torch.tensor([1, 7])
    drawn = torch.randn((2, n) if n > 1 else 2, generator=torch.Generator().manual_seed(6))
    return (drawn > 0).float() if kind == "multi" else drawn


def _record(model: Transformer, case: dict[str, Any]) -> dict[str, Any]:
    dtype = next(model.parameters()).dtype
    model.eval()
    inputs = {n: x.to(dtype) if x.is_floating_point() else x for n, x in case["inputs"].items()}
    short = {n: x for n, x in inputs.items() if "label" not in n}
    made: dict[str, Any] = {}
    with torch.no_grad():
        out = model(**short, **case["decoder"])
        made |= {"logits": out.logits, "hidden": out.last_hidden_state}
        if "padded" in case:
            made["padded"] = model(**case["padded"], **case["decoder"]).logits[case["real"]]
    for name, training in (("gradients", False), ("trained", True)):
        model.train(training).zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        made["loss"] = made.get("loss", loss.detach())
        made[name] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and not n.startswith("mtp.")}
    return made


def loaded_elsewhere(cases: Path, home: Path, transformers: str | None = None) -> Iterator[dict[str, Any]]:
    environment = {"PATH": os.environ["PATH"], "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    if transformers is not None:
        environment["TXTRAIN_TRANSFORMERS"] = transformers
    command = [sys.executable, "-I", str(HERE / "standalone.py"), str(cases)]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=home, timeout=3000)
    assert ran.returncode == 0, ran.stderr[-3000:]
    for line in ran.stdout.splitlines():
        if line.startswith('{"case"'):
            yield json.loads(line)


def wrong(result: dict[str, Any]) -> dict[str, Any]:
    """What does not equal ours."""
    if "error" in result:
        return result
    found = {}
    for name, value in result.items():
        if name in ("case", "rounding") or value is True:
            continue
        # The loss is summed in float32 in both, and its gradient with it.
        allowed = 1e-10 if name in ("bare", "saved again") or (name.endswith("float64") and name.split()[0] in ("logits", "padded")) else 1e-5
        if not isinstance(value, float) or not value <= allowed:
            found[name] = value
    return found


def check_variety(configs: list[ModelConfig]) -> None:
    """Every topology, kind of class and option of an axis is among them."""
    roles = {role_of(c).name for c in configs}
    assert roles >= {"CausalLM", "Seq2SeqLM", "MaskedLM", "PreTraining", "SequenceClassification", "ImageClassification"}, roles
    assert {(c.topology, c.head.type) for c in configs} >= {(topology, head) for topology, of in LEGAL_HEADS.items() for head in of}
    assert sum(c.family == "transformer" for c in configs) >= len(configs) // 20
    for axis in (*MODEL_AXES, "norm_position"):
        wanted = {name for name in TABLE[axis] if not is_own(axis, SimpleNamespace(type=name))} - {"none" if axis == "head" else ""}
        assert {getattr(c, axis) if axis == "norm_position" else getattr(c, axis).type for c in configs} >= wanted, axis


def check_drawn(n: int, folder: Path, trainer: bool) -> None:
    configs = drawn(n)
    assert len(configs) == n
    check_variety(configs)
    plain = [] if not trainer else [role_of(c).name for c in configs if not c.ffn.n_experts]  # a mixture balances each part of a batch by itself
    for i, config in enumerate(configs):
        first = not config.ffn.n_experts and role_of(config).name in plain
        if first:
            plain = [name for name in plain if name != role_of(config).name]
        write_case(config, folder / "cases" / f"case_{i:04d}", seed=i, trainer=first)
    files = [str(path) for path in folder.glob("cases/*/modeling_txtrain.py")]
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F,E501,I", "--line-length", "120", *files]
    checked = subprocess.run(ruff, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout[-3000:]
    (folder / "home").mkdir()
    results = list(loaded_elsewhere(folder / "cases", folder / "home", OTHER))
    assert len(results) == len(configs)
    assert any("trainer" in r for r in results) == trainer
    assert sum(r.get("rounding", 0) > 1e-5 for r in results) <= n // 200  # only float64 is compared of them
    bad = {r["case"]: found for r in results if (found := wrong(r))}
    assert not bad, json.dumps(bad, indent=1)[:6000]


def test_grafts_leave_as_folders_that_load_without_txtrain(tmp_path: Path) -> None:
    check_drawn(N_DEFAULT, tmp_path, trainer=False)


@pytest.mark.slow
def test_many_grafts_leave_as_folders_that_load_without_txtrain(tmp_path: Path) -> None:
    """TXTRAIN_GRAFTS: how many; TXTRAIN_TRANSFORMERS: a folder with another version of transformers."""
    check_drawn(N_SLOW, tmp_path, trainer=True)

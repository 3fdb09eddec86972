"""One process of the group that test_tensor.py starts: trains each case with its parts cut, and alone, and writes how far they differ.

python -m tests.distributed.tensor_cases cases.json out.json      with RANK, WORLD_SIZE, ... set, as a launcher does
"""

from __future__ import annotations

import contextlib
import dataclasses as dc
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from tests.device import BACKEND, DEVICE, accelerator
from tests.distributed.group import as_worker
from tests.models import tiny
from txtrain import compose
from txtrain.config.plugins import component
from txtrain.config.schema import Train
from txtrain.model import options
from txtrain.model.attention.multi_head import MultiHeadAttention
from txtrain.model.config import ModelConfig
from txtrain.model.shape import InitConfig
from txtrain.parallel.build import make_parallel
from txtrain.parallel.gradient_buckets import local
from txtrain.parallel.one_process import OneProcess, whole
from txtrain.registry import TABLE, register
from txtrain.training.batches import add, cut, seed_everything
from txtrain.training.models_read import described
from txtrain.training.module import LitModule

STEPS, BATCH = 6, 8


OWN_FFN = "an FFN of one's own"


class OwnFFN(nn.Module):
    """A component that no rule cuts."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.a, self.b, self.gain = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim), nn.Parameter(torch.empty(dim))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.gain)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x_BTD)).cumsum(1)) * self.gain  # across positions


class OwnAttention(MultiHeadAttention):
    """Nor this."""


def attention(**knobs: Any) -> options.AttentionConfig:
    return options.AttentionConfig(**{"type": "mha"} | knobs)


mla = options.MLAConfig(type="mla", q_rank=6, kv_rank=10, nope_dim=5, rope_dim=6, v_dim=7, bias=True)
moe = options.MoEConfig(type="moe", n_experts=4, hidden_dim=16, dense_layers=1)
mlp = options.MLPConfig(type="mlp", hidden_dim=20)
layer = options.LayerNormConfig(type="layer")
relative = options.RelativeConfig(type="relative", n_buckets=8, max_distance=20)
learned = options.LearnedConfig(type="learned")
mlm = options.MLMHeadConfig(type="mlm")
classes = options.ClassHeadConfig(type="class", n_classes=5, pooling="first")
patches = options.PatchEmbeddingConfig(type="patch", image_size=12, patch_size=4)
tokens = options.TokenEmbeddingConfig(type="token", scale=True, padding_idx=3, norm=True)

MODELS: dict[str, dict[str, Any]] = {
    "mha, swiglu, rope": {},
    "untied head": {"tie_word_embeddings": False},
    "gqa": {"attention": attention(type="gqa", n_kv_heads=2, bias=True, qk_norm=True)},
    "mqa: its head is whole": {"attention": attention(type="mqa", n_kv_heads=1, bias=True, qk_norm=True), "norm": layer},
    "windows and softcaps": {"attention": attention(window=(4, None), softcap=4.0), "logit_softcap": 5.0, "norm_position": "sandwich"},
    "relative": {"position": relative, "ffn": mlp},
    "alibi": {"position": options.AlibiConfig(type="alibi"), "norm_position": "inner"},
    "alibi and softcap": {"position": options.AlibiConfig(type="alibi"), "attention": attention(softcap=4.0)},
    "learned, mlp, post": {"position": learned, "ffn": mlp, "norm": layer, "norm_position": "post"},
    "padded tokens, scaled": {"embedding": tokens},
    "mla": {"attention": mla},
    "moe": {"ffn": moe},
    "moe with an auxiliary loss": {"ffn": dc.replace(moe, type="moe_softmax", gate="softmax", aux_weight=0.1, bias_update_rate=0.0, dense_layers=0)},
    "further tokens": {"mtp_depth": 2, "attention": mla, "ffn": moe},
    "encoder": {"topology": "encoder", "head": mlm, "position": learned, "embedding": options.TokenEmbeddingConfig(type="token", n_types=2)},
    "two stacks": {"topology": "encoder_decoder", "position": relative, "pad_token_id": 0, "attention": attention(bias=True)},
    "two stacks, alibi": {"topology": "encoder_decoder", "position": options.AlibiConfig(type="alibi"), "share_embeddings": False, "pad_token_id": 0},
    OWN_FFN: {},  # its config is made by `own_parts`
    "an attention of one's own": {"attention": attention(type="tests_own_attention"), "position": relative},
    "the same across": {"attention": attention(type="tests_own_attention"), "topology": "encoder_decoder", "pad_token_id": 0},
    "dropout": {"attention": attention(dropout=0.1), "ffn": dc.replace(mlp, dropout=0.2), "dropout": 0.3},
    "images": {
        "topology": "encoder",
        "embedding": patches,
        "head": classes,
        "position": learned,
        "max_seq_len": 10,
        "vocab_size": 0,
        "tie_word_embeddings": False,
    },
}


@dc.dataclass(frozen=True)
class Case:
    """model: a key of MODELS. overrides: of the run. length: positions."""

    model: str
    overrides: tuple[str, ...] = ()
    length: int = 16


def config_of(case: Case) -> Train:
    fixed = ("model=llama2", "data=text", "data.tokenizer=bytes", "data.path=none.txt", accelerator(), f"data.global_batch_size={BATCH}")
    config = compose([*fixed, *case.overrides])
    assert isinstance(config, Train)
    model = tiny(**{"init": InitConfig(std=0.1)} | MODELS[case.model])
    assert not list(model.check()), list(model.check())
    return dc.replace(config, model=model)


def batch_of(model: ModelConfig, length: int, step: int) -> dict[str, torch.Tensor]:
    """Of all processes together."""
    generator = torch.Generator().manual_seed(step)
    if not model.vocab_size:
        return {"pixel_values": torch.randn(BATCH, 3, 12, 12, generator=generator), "labels": torch.randint(0, 5, (BATCH,), generator=generator)}
    ids = torch.randint(0, model.vocab_size, (BATCH, length), generator=generator)
    if model.topology == "decoder":
        documents = (torch.arange(length) >= length // 3).long().expand(BATCH, -1)
        return {"input_ids": ids, "labels": ids.clone().masked_fill(ids % 7 == 0, -100), "document_ids": documents}
    labels = torch.randint(0, model.vocab_size, (BATCH, length), generator=generator)
    mask = (torch.arange(length) < 5 + torch.arange(BATCH)[:, None]).long()
    more = {"token_type_ids": (ids % 2)} if model.topology == "encoder" else {}
    return {"input_ids": ids, "attention_mask": mask, "labels": labels.masked_fill(labels % 3 == 0, -100), **more}


class Trained:
    """A model trained for a few steps, as LitModule does it, without a trainer."""

    def __init__(self, config: Train, parallel: OneProcess, length: int) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.dropped: dict[str, torch.Tensor] = {}
        self._device = parallel.device()
        self._autocast = parallel.trainer_arguments()["precision"] == "bf16-mixed"
        with mock.patch("txtrain.training.module.checked", lambda value, *_: value):  # models of every kind, fed by hand
            module = LitModule(config, described(config), parallel)
        module._device = self._device  # as a trainer would: there is nothing yet that `.to` could move
        module.configure_model()
        self.model: Any = module.model
        for name, part in self.model.named_modules():
            if isinstance(part, nn.Dropout) and part.p:
                part.register_forward_hook(partial(self._note, name))
        # Adam would move a parameter whose gradient is rounding alone (a key's bias) by the whole rate.
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.3, momentum=0.5)
        for step in range(STEPS):
            seed_everything(0, step, parallel.rank)
            batch = {name: x.chunk(parallel.size)[parallel.rank].to(self._device) for name, x in batch_of(config.model, length, step).items()}
            self._step(module, parallel, batch)
        self.parameters = {name: whole(p.detach()).cpu().clone() for name, p in self.model.named_parameters()}
        self.parameters["logits"] = self._evaluated({name: x.to(self._device) for name, x in batch_of(config.model, length, 99).items()})

    def _note(self, name: str, part: nn.Module, given: Any, out: torch.Tensor) -> None:
        self.dropped.setdefault(name, (out == 0).flatten()[:200].cpu())

    def _step(self, module: LitModule, parallel: OneProcess, batch: dict[str, torch.Tensor]) -> None:
        depth = module.config.model.mtp_depth
        counts = parallel.reduce({"n": (batch["labels"] != -100).sum()})
        shares = []
        parts = list(cut(batch, module.config.data.micro_batch_size or len(batch["labels"])))
        for i, part in enumerate(parts, start=1):
            half = torch.autocast(self._device.type, torch.bfloat16) if self._autocast else contextlib.nullcontext()
            with parallel.micro_batch(module, last=i == len(parts)), half:
                out = self.model(**part, num_items_in_batch=counts["n"], mtp_items_in_batch=[counts["n"]] * depth, return_logits=False)
                loss = out.loss + sum(out.mtp_losses or (), start=0.0)
                loss.backward()
            shares.append({"loss": loss.detach()})
        self.norms.append(float(parallel.clip(self.model.parameters(), 1.0)))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(float(parallel.reduce(add(shares))["loss"]))

    @torch.no_grad()
    def _evaluated(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        self.model.eval()
        logits: torch.Tensor = self.model(**batch).logits.cpu()
        self.model.train()
        return logits


def copies(model: nn.Module, parallel: Any) -> float:
    """The largest difference between the processes that hold a parameter whole."""
    group, size = parallel.mesh["tensor"].get_group(), parallel.layout.tensor
    largest = 0.0
    for p in model.parameters():
        if p.placements[-1].is_replicate():  # type: ignore[attr-defined]
            mine = local(p.detach())
            theirs = [torch.empty_like(mine) for _ in range(size)]
            dist.all_gather(theirs, mine.contiguous(), group=group)
            largest = max([largest, *(float((mine - other).abs().max()) for other in theirs if other.numel())])
    return largest


def misdropped(trained: Trained, parallel: Any) -> list[str]:
    """Where processes drop alike what is different, or differently what is the same: within the blocks, and outside them."""
    theirs: list[Any] = [None] * parallel.layout.tensor
    dist.all_gather_object(theirs, trained.dropped, group=parallel.mesh["tensor"].get_group())
    return [name for name, mine in theirs[0].items() for other in theirs[1:] if torch.equal(mine, other[name]) == name.startswith("blocks.")]


def compared(case: Case, first: bool) -> dict[str, Any]:
    """Largest relative differences between one process and the processes that there are; known to the first."""
    config = config_of(case)
    parallel = make_parallel(config)
    with parallel.started():
        together = Trained(config, parallel, case.length)
        equal, dropped = copies(together.model, parallel), misdropped(together, parallel)
    if not first:
        return {}
    alone = Trained(dc.replace(config, strategy=compose([]).strategy), OneProcess(config), case.length)
    found = {name: max(abs(x - y) / abs(x) for x, y in zip(getattr(alone, name), getattr(together, name), strict=True)) for name in ("losses", "norms")}
    assert alone.parameters.keys() == together.parameters.keys()
    far = {n: float((a - together.parameters[n]).abs().max() / a.abs().max().clamp(min=1e-2)) for n, a in alone.parameters.items()}
    name = max(far, key=lambda n: far[n])
    return {**found, "parameters": far[name], "copies": equal, "misdropped": dropped, "which": name}


def own_parts() -> None:
    """Register them: not when this is imported, or every test after it would find such options."""
    register("attention", "tests_own_attention", OwnAttention, options.AttentionConfig)
    component("ffn", "tests_own_ffn")(OwnFFN)
    MODELS[OWN_FFN] = {"ffn": TABLE["ffn"]["tests_own_ffn"].config(type="tests_own_ffn")}


def main() -> None:
    own_parts()
    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if DEVICE == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(BACKEND, init_method=f"file://{os.environ['TXTRAIN_STORE']}", rank=rank, world_size=size)
    found: dict[str, Any] = {}
    for name, case in json.loads(Path(sys.argv[1]).read_text()).items():
        found[name] = compared(Case(case["model"], tuple(case["overrides"]), case["length"]), first=rank == 0)
        if rank == 0:
            Path(sys.argv[2]).write_text(json.dumps(found, indent=1))
            print(f"{name}:", *(f"{k} {v:.1e}" if isinstance(v, float) else v for k, v in found[name].items()), flush=True)


if __name__ == "__main__":
    as_worker(main)

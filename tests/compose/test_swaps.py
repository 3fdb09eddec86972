"""Every single swap on every family: it trains, through `txtrain.train`, or is refused where it is composed with the table's reason."""

import dataclasses as dc
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

import txtrain
from tests.cases import some
from tests.compose.test_families import LAPTOP
from tests.training import write_text
from txtrain.config import compatibility
from txtrain.config.schema import Train
from txtrain.errors import ConfigError
from txtrain.model import rules
from txtrain.registry import MODEL_AXES, TABLE, VALUE_AXES

SHAPE = (
    "model.n_layers=2",
    "model.dim=64",
    "model.n_heads=4",
    "model.dropout=0",  # all three, so that the loss on one batch must fall, and not by luck
    "model.output_dropout=0",
    "model.ffn.dropout=0",
)
RUN = (
    "optimizer.lr=1e-4",  # short steps: along the gradient the loss falls, whatever the family starts from
    "scheduler=constant",
    "scheduler.warmup_steps=0",
    "data.global_batch_size=4",
    "trainer.accelerator=cpu",
    "trainer.max_steps=2",
    "trainer.limit_val_batches=0",
    "sample.n=0",
    "run_dir=run",
)
VOCABULARY = ("model.vocab_size=400", "model.max_seq_len=32")
TEXT = (*VOCABULARY, "data=text", "data.path=texts", "data.tokenizer=bytes")
PAIRS = (*VOCABULARY, "data=reverse", "data.n_pairs=200", "data.max_length=8")
DATA = dict.fromkeys(LAPTOP, TEXT) | {"transformer": PAIRS, "vit": ("data=digits",)}

CLASSIFIER = (
    "model.topology=encoder",
    "model/embedding=patch",
    "model/head=class",
    "model.embedding.image_size=8",
    "model.embedding.patch_size=2",
    "model.embedding.n_channels=1",
    "model.head.n_classes=10",
    "model.vocab_size=0",
    "model.max_seq_len=17",
    "model.tie_word_embeddings=false",
    "model.logit_softcap=null",
    "model.mtp_depth=0",
    "objective=image_classification",
    "data=digits",
)
LEGAL = {("bert", "model/head=lm")}  # of the swaps of embedding and head

KEYS = {f"model/{axis}": axis for axis in MODEL_AXES} | {key: axis for axis, key in VALUE_AXES.items()}
OF_THE_BLOCK = ("model/attention", "model/ffn", "model/position", "model/norm", "model.norm_position")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Four documents, tokenised once for all swaps: pairs of segments need more than one."""
    made = tmp_path_factory.mktemp("swaps")
    (made / "texts").mkdir()
    for i in range(4):
        write_text(made / "texts" / f"{i}.txt")
    return made


@pytest.fixture(scope="module")
def runs() -> dict[str, Train]:
    """Of each family a tiny run, once it has been composed."""
    return {}


@pytest.fixture
def unchanged(folder, clean_room, monkeypatch, runs):
    """unchanged("gpt2"): a tiny run of the family on its own kind of data."""
    monkeypatch.setenv("TXTRAIN_CACHE", str(folder / "cache"))
    (clean_room / "texts").symlink_to(folder / "texts")

    def compose(family: str) -> Train:
        if family not in runs:
            runs[family] = txtrain.compose([f"model={family}", *SHAPE, *DATA[family], *RUN])
        return runs[family]

    return compose


@pytest.fixture
def swapped(unchanged, job):
    """swapped("gpt2", "model/ffn=moe"): the same run with another model. Composed with what shapes the model alone, which is quicker."""

    def compose(family: str, *overrides: str) -> Train:
        shape = [override for override in DATA[family] if override.startswith("model.")]
        return dc.replace(unchanged(family), model=job(f"model={family}", *SHAPE, *shape, *overrides).config.model)

    return compose


class FirstBatch(pl.Callback):
    """The loss of the first batch: at the start, and after each update. Later batches hide other tokens, and compare with nothing."""

    def __init__(self) -> None:
        self.batch: Any = None
        self.losses: list[float] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.batch is None:
            self.batch = batch
            self._measure(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._measure(pl_module)

    @torch.no_grad()
    def _measure(self, module) -> None:
        terms = module.objective(module.model, self.batch, module.objective.denominators(self.batch))
        self.losses.append(float(module.objective.total(terms)))


def trains(config: Train, what: str) -> None:
    seen = FirstBatch()
    txtrain.train(config, callbacks=[seen])
    first, second, third = seen.losses
    assert max(second, third) < first, f"{what}: loss {first} at the start, {second} after an update, {third} after two"


def others(family: Train, axis: str) -> list[str]:
    """The options of an axis that are not the family's own."""
    own = getattr(family.model, axis)
    return [option for option in TABLE[axis] if option != getattr(own, "type", own)]


def dry(config: Train) -> Train:
    """Two steps that write nothing."""
    return dc.replace(config, trainer=dc.replace(config.trainer, fast_dev_run=2))


@pytest.mark.parametrize("family", some(LAPTOP, ("gpt1", "gemma2", "transformer", "bert", "t5_v1_1", "vit", "deepseek_r1")))
def test_every_family_trains(family, unchanged):
    trains(unchanged(family), family)


@pytest.mark.parametrize("key", OF_THE_BLOCK)
@pytest.mark.parametrize("family", some(LAPTOP, ("gpt2",)))
def test_every_swap_within_the_block_trains_on_every_family(family, key, unchanged, swapped):
    for option in others(unchanged(family), KEYS[key]):
        trains(dry(swapped(family, f"{key}={option}")), f"{family} {key}={option}")


@pytest.mark.parametrize("axis", ["embedding", "head"])
@pytest.mark.parametrize("family", some(LAPTOP, ("gpt2", "bert", "t5", "vit")))
def test_a_swap_of_what_is_read_or_told_trains_or_is_refused_with_the_tables_reason(family, axis, unchanged, swapped):
    """By itself: most need another objective or other data too."""
    run = unchanged(family)
    for option in others(run, axis):
        swap = f"model/{axis}={option}"
        if (family, swap) in LEGAL:
            trains(dry(swapped(family, swap)), f"{family} {swap}")
            continue
        model = dc.replace(run.model, **{axis: TABLE[axis][option].config(type=option)})
        reasons = [*rules.problems(model)] or [rule.why for rule in broken_by(dc.replace(run, model=model))]
        assert reasons, f"{family} {swap}: no rule forbids it"
        with pytest.raises(ConfigError) as refused:
            swapped(family, swap)
        assert all(reason in str(refused.value) for reason in reasons), f"{family} {swap}"


def broken_by(run: Train) -> list[rules.Rule]:
    choices = {"model": run.model, "objective": run.objective, "data": run.data}
    objective = [rule for rule in compatibility.objective_rules(run.objective.type) if rule.broken_by(choices)]
    return objective[:1] or [rule for rule in compatibility.RUN_RULES if rule.broken_by(choices)]


@pytest.mark.parametrize("family", some(LAPTOP, ("llama2", "t5", "vit")))
def test_every_family_classifies_images_once_all_that_goes_with_it_is_changed(family, unchanged):
    """An encoder of patches, with the family's own attention, feed-forward, norms and positions."""
    run = txtrain.compose([f"model={family}", *SHAPE, *CLASSIFIER, *RUN, "optimizer.lr=1e-5"])  # pixels are not scaled as words are
    trains(dry(run), f"{family} on images")


def test_grafts_on_several_axes_at_once_train(swapped):
    trains(dry(swapped("gpt2", "model.norm_position=post", "model/position=rope", "model/ffn=swiglu")), "gpt2")

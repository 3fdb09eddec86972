"""The table of what changes nothing: ways to make the same ten steps, for every kind of model, and how far each is from one process.

test_equivalence.py fills it in; with TXTRAIN_WRITE_DOCS=1 it is written into docs/distributed.md, cell by cell.
"""

from __future__ import annotations

import dataclasses as dc
import json
import random
import re
from pathlib import Path

import torch

import txtrain
from tests.device import DEVICE, accelerator, needs
from tests.distributed.callbacks import named
from tests.distributed.group import Case, train
from tests.distributed.runs import largest_differences, overrides
from txtrain.monitor.metrics_csv import read

ALLOWED = 1e-5  # relative, float32: the order of summation
ROUNDED = 5e-3  # the same of losses in bf16-mixed, which rounds to 8 bits in places that depend on the way

KINDS = {  # by column: a key of runs.MODELS
    "decoder": "decoder",
    "tied, windows, caps": "tied decoder with softcaps and windows",
    "encoder": "encoder",
    "T5": "two stacks",
    "Transformer": "two stacks of 2017",
    "ViT": "images",
    "experts": "experts",
}
TEXTS = ("decoder", "tied, windows, caps", "T5", "experts")  # of packed documents; the encoder's are cut into pairs, unless NO_PAIRS
# Adam above whose gradients lies its epsilon is near SGD: a wrong factor on a gradient shows, which Adam divides out.
STEP = ("optimizer=adamw", "optimizer.eps=0.001", "optimizer.lr=0.01", "trainer.val_check_interval=10")
CLIP = 0.1  # below every gradient's norm
NO_PAIRS = ("model.head.next_sentence=false",)
# With the default one an input of a ReLU is 2e-7 at step 4: on which side of zero it lies, and so 5e-5 of a gradient's norm, is for the last bit to say.
SEED = {"Transformer": ("seed=2",)}


@dc.dataclass(frozen=True)
class Way:
    """How the steps are made, and in how many processes.

    variation: a name in variations.py. base: what the reference has too, and base_variation likewise. kinds: of those that it exists for,
    `why` telling the rest. of: more that both have, of one kind.
    """

    n: int = 1
    overrides: tuple[str, ...] = ()
    variation: str = ""
    base: tuple[str, ...] = ()
    base_variation: str = ""
    kinds: tuple[str, ...] = tuple(KINDS)
    why: str = ""
    of: dict[str, tuple[str, ...]] = dc.field(default_factory=dict)
    allowed: float = ALLOWED
    columns: tuple[str, ...] = ("loss", "val_loss", "grad_norm")

    def reference(self, kind: str) -> tuple[tuple[str, ...], str]:
        return self.base + self.of.get(kind, ()), self.base_variation


def without(*kinds: str) -> tuple[str, ...]:
    return tuple(k for k in KINDS if k not in kinds)


def recompute(how: str | int) -> str:
    return f"trainer.activation_checkpointing={how}"


FULL, SELECTIVE, SECOND = recompute("full"), recompute("selective"), recompute(2)
COMPILED, HALF = "trainer.compile=true", "trainer.precision=bf16-mixed"
BY_TWO, BY_ONE = "data.micro_batch_size=2", "data.micro_batch_size=1"
ACROSS = "data.cross_document_attention=true"
STAGES = {f"deepspeed_stage_{i}": Way(2, (f"strategy=deepspeed_stage_{i}", BY_TWO)) for i in (1, 2, 3)}

WAYS = {
    # one process
    "accumulation": Way(overrides=(BY_TWO,)),
    "activation checkpointing, full": Way(overrides=(FULL,)),
    "activation checkpointing, selective": Way(overrides=(SELECTIVE,)),
    "activation checkpointing, every 2nd block, and accumulation": Way(overrides=(SECOND, BY_ONE)),
    "compiled": Way(overrides=(COMPILED,)),
    "compiled, checkpointing full, accumulation": Way(overrides=(COMPILED, FULL, BY_TWO)),
    "compiled, checkpointing selective, accumulation": Way(overrides=(COMPILED, SELECTIVE, BY_TWO)),
    "attention by the formula": Way(variation="formula", kinds=without("tied, windows, caps"), why="caps are computed by the formula anyway"),
    "attention with the mask drawn": Way(variation="drawn mask", kinds=("ViT",), why="that is what the others do"),
    "attention by flag, beside the formula": Way(
        variation="by flag", base=(ACROSS,), base_variation="formula", kinds=("decoder", "experts"), why="the kernel must be told more than a flag"
    ),
    "documents apart and padded, beside packed": Way(
        variation="apart",
        kinds=("decoder", "tied, windows, caps", "encoder", "T5", "experts"),
        why="a sample is one pair or image",
        of={"encoder": NO_PAIRS, "experts": ("model.mtp_depth=0",)},  # its module visits experts also where a document has no later token
    ),
    "loss by chunks of 5 tokens": Way(variation="chunks", kinds=without("ViT"), why="ten logits"),
    "loss of all logits at once": Way(variation="all logits", kinds=without("ViT"), why="that is what it does"),
    # two
    "ddp": Way(2, ("strategy=ddp",)),
    "ddp, accumulation": Way(2, ("strategy=ddp", BY_TWO)),
    "fsdp": Way(2, ("strategy=fsdp",)),
    "fsdp, accumulation": Way(2, ("strategy=fsdp", BY_ONE)),
    "fsdp, each micro-batch reduced": Way(2, ("strategy=fsdp", "strategy.reduce_each_micro_batch=true", BY_ONE)),
    "fsdp, gathered parameters kept": Way(2, ("strategy=fsdp", "strategy.reshard_after_forward=false")),
    "fsdp, offload, accumulation": Way(2, ("strategy=fsdp", "strategy.cpu_offload=true", BY_TWO)),
    "fsdp, checkpointing full": Way(2, ("strategy=fsdp", FULL)),
    "fsdp, checkpointing selective, accumulation": Way(2, ("strategy=fsdp", SELECTIVE, BY_TWO)),
    "fsdp, compiled": Way(2, ("strategy=fsdp", COMPILED)),
    "fsdp, compiled, checkpointing selective": Way(2, ("strategy=fsdp", COMPILED, SELECTIVE)),
    "tp": Way(2, ("strategy=tp",)),
    "tp, checkpointing full, accumulation": Way(2, ("strategy=tp", FULL, BY_TWO)),
    **STAGES,
    # four
    "hsdp, each micro-batch reduced": Way(4, ("strategy=hsdp", "strategy.reduce_each_micro_batch=true", BY_ONE)),
    "hsdp": Way(4, ("strategy=hsdp", BY_ONE)),
    "fsdp on 4": Way(4, ("strategy=fsdp",)),
    "tp, two copies": Way(4, ("strategy=tp", "strategy.tp_size=2", BY_TWO)),
    "fsdp_tp": Way(4, ("strategy=fsdp_tp", BY_TWO)),
    # in bfloat16, beside one process in bfloat16
    **{
        f"bf16-mixed, {strategy}": Way(2, (f"strategy={strategy}", BY_TWO), base=(HALF,), allowed=ROUNDED, columns=("loss", "val_loss"))
        for strategy in ("ddp", "fsdp", "tp", "deepspeed_stage_2")
    },
}

SEEN: dict[tuple[str, str], float] = {}  # by way and kind


class Runs:
    """Runs in one folder, and those that others are compared with, made when they are asked for. device: cpu, or cuda."""

    def __init__(self, folder: Path, device: str = DEVICE) -> None:
        self.folder, self.device = folder, device
        self._references: dict[tuple[str, tuple[str, ...], str], Path] = {}

    def reference(self, kind: str, way: Way) -> Path:
        """The folder of the run in one process."""
        key = (kind, *way.reference(kind))
        if key not in self._references:
            given, variation = key[1:]
            run = self._alone(self._overrides(kind, f"reference {len(self._references)}", *given), variation)
            norms = [float(row["grad_norm"]) for row in read(run / "metrics.csv")]
            assert min(norms) > CLIP, f"{kind}: gradients that are not clipped: {norms}"
            self._references[key] = run
        return self._references[key]

    def compare(self, cells: list[tuple[str, str]]) -> None:
        """Train what the cells (way, kind) say, all of one number of processes, in one launch; note how far they are from the reference.

        Raises:
            AssertionError: of those that are farther than is allowed.
        """
        (n,) = {WAYS[way].n for way, _ in cells}
        needs(n, self.device)
        for way, kind in cells:
            self.reference(kind, WAYS[way])
        cases = {(way, kind): self._case(way, kind) for way, kind in cells}
        if n == 1:
            for (way, _), case in cases.items():
                self._alone(list(case.overrides), WAYS[way].variation)
        else:
            listed = {f"{way}: {kind}": case for (way, kind), case in cases.items()}
            train(listed, n, self.folder / f"{n} processes", timeout=120 + 60 * len(cases), device=self.device)
        wrong = []
        for (way, kind), case in cases.items():
            run = Path(case.overrides[-1].removeprefix("run_dir="))
            far = largest_differences(self.reference(kind, WAYS[way]), run, WAYS[way].columns)
            SEEN[way, kind] = max(far.values())
            print(f"{way}, {kind}: " + ", ".join(f"{name} {value:.1e}" for name, value in far.items()), flush=True)
            wrong += [f"{way}, {kind}: {name} {value:.1e}, allowed {WAYS[way].allowed:.0e}" for name, value in far.items() if not value < WAYS[way].allowed]
        assert not wrong, "\n".join(wrong)

    def _case(self, way: str, kind: str) -> Case:
        how = WAYS[way]
        given = (*how.reference(kind)[0], *how.overrides, *([f"trainer.devices={how.n}"] if how.n > 1 else []))
        return Case(self._overrides(kind, f"{way}, {kind}", *given), [how.variation] if how.variation else [])

    def _overrides(self, kind: str, name: str, *given: str) -> list[str]:
        made = overrides(self.folder, KINDS[kind], name, *STEP, *SEED.get(kind, ()), f"trainer.gradient_clip_val={CLIP}", *given)
        if kind in TEXTS or NO_PAIRS[0] in given:
            made = [o for o in made if not o.startswith("data.path=")] + [f"data.path={short_documents(self.folder)}"]
        here = [o for o in made if not o.startswith(("run_dir=", "trainer.accelerator="))]
        return [*here, accelerator(self.device), *(o for o in made if o.startswith("run_dir="))]

    @staticmethod
    def _alone(given: list[str], variation: str) -> Path:
        torch._dynamo.reset()  # graphs of the models before, of the same code: no command has them, and they make this one's sizes dynamic
        run = txtrain.train(txtrain.compose(given), callbacks=[named(variation)] if variation else []).run_dir
        assert run is not None
        return run


def short_documents(folder: Path) -> Path:
    """Documents of 4 to 40 bytes: several in a row of 32."""
    path = folder / "short.jsonl"
    if not path.exists():
        draw = random.Random(0)
        text = (folder / "text/0.txt").read_text()
        begins = [draw.randrange(len(text) - 40) for _ in range(900)]
        path.write_text("".join(json.dumps({"text": text[b : b + draw.randint(4, 40)].strip()}) + "\n" for b in begins))
    return path


# ---------------------------------------------------------------------------------------------------------------- the page

BEGIN, END = "<!-- the table of tests/distributed/equivalence.py -->", "<!-- its end -->"


def write(page: Path, machine: str) -> None:
    """Between the marks in the page: the cells that were seen, and of the others what stood there."""
    text = page.read_text()
    before, table, after = re.split(f"{BEGIN}|{END}", text)
    old = _cells(table)
    seen = {key: f"{value:.1e}" for key, value in SEEN.items()}
    rows = []
    for name, way in WAYS.items():
        cells = [seen.get((name, kind), old.get((name, kind), "")) if kind in way.kinds else "·" for kind in KINDS]
        rows.append(f"| {name} | {way.n} | {' | '.join(cells)} |")
    whys = [f"{name}: {way.why}" for name, way in WAYS.items() if way.why]
    head = f"| | processes | {' | '.join(KINDS)} |\n|---|---|{'---|' * len(KINDS)}"
    notes = f"·: not there ({'; '.join(whys)})."
    page.write_text(f"{before}{BEGIN}\n{machine}\n\n{head}\n" + "\n".join(rows) + f"\n\n{notes}\n{END}{after}")


def _cells(table: str) -> dict[tuple[str, str], str]:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    if not rows:
        return {}
    kinds = rows[0][2:]
    return {(row[0], kind): value for row in rows[2:] for kind, value in zip(kinds, row[2:], strict=True) if value != "·"}

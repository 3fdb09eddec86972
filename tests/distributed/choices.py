"""What an exact resume is proved for: every objective, optimizer, schedule, dropout, accumulation, precision, packing and strategy."""

from __future__ import annotations

from pathlib import Path

from tests.distributed.covering import Case
from tests.distributed.runs import documents
from tests.models import seeded, tiny
from tests.training import write_chats, write_labels, write_preferences
from txtrain import save_pretrained

STEPS = 8
RUN = (
    "trainer.accelerator=cpu",
    f"trainer.max_steps={STEPS}",
    "trainer.val_check_interval=3",
    "trainer.limit_val_batches=1",
    "trainer.log_every_n_steps=1",
    "save.every_n_steps=100",
    "save.keep_best=0",
    "sample.n=1",
    "sample.max_new_tokens=2",
    "data.global_batch_size=8",
    "data.val_fraction=0.2",
    "model.n_layers=2",
    "model.dim=32",
    "model.n_heads=4",
)
TEXT = ("data=text", "data.tokenizer=bytes", "model.vocab_size=360", "model.max_seq_len=32")
OBJECTIVES = {
    "causal_lm": ("model=llama2", *TEXT),
    "causal_lm + mtp": ("model=deepseek_r1", *TEXT),  # and experts, whose biases move with each step
    "masked_lm + nsp": ("model=bert", *TEXT),
    "masked_lm": ("model=bert", "objective.next_sentence=false", *TEXT),
    "span_corruption": ("model=t5", *TEXT),
    "prefix_lm": ("model=llama2", "objective=prefix_lm", *TEXT),
    "sft": ("model=gpt2", "objective=sft", "model.vocab_size=360", "model.max_seq_len=32"),
    "distill": ("model=gpt2", "objective=distill", *TEXT),
    "dpo": ("model=gpt2", "objective=dpo", "model.vocab_size=360", "model.max_seq_len=48"),
    "seq2seq": ("model=transformer", "data=reverse", "data.n_pairs=400", "model.vocab_size=257", "model.max_seq_len=32"),
    "image_classification": ("model=vit", "data.crop_padding=1"),
    "classification": ("model=bert", "data=labels", "data.seq_len=32", "data.tokenizer=bytes", "model.vocab_size=360", "model.max_seq_len=32"),
    "classification + lm": (
        "model=gpt1", "data=labels", "data.seq_len=32", "data.tokenizer=bytes", "model.vocab_size=360", "model.max_seq_len=32", "model.head.lm=true",
        "optimizer.layer_decay=0.7",
    ),
}
CHOICES = {
    "objective": OBJECTIVES,
    "optimizer": {name: (f"optimizer={name}", "optimizer.lr=0.003") for name in ("adamw", "adam", "adafactor", "muon", "lion")},
    "schedule": {
        "constant": ("scheduler=constant", "scheduler.warmup_steps=3"),
        "cosine": ("scheduler=cosine", "scheduler.warmup_steps=3"),
        "linear": ("scheduler=linear", "scheduler.warmup_steps=3"),
        "inverse_sqrt": ("scheduler=inverse_sqrt", "scheduler.warmup_steps=3"),
        "wsd": ("scheduler=wsd", "scheduler.warmup_steps=3", "scheduler.decay_steps=4"),
    },
    "dropout": {"none": ("model.dropout=0",), "dropout": ("model.dropout=0.1",)},
    "micro-batches": {"one": (), "several": ("data.micro_batch_size=2",)},
    "precision": {name: (f"trainer.precision={name}",) for name in ("32-true", "bf16-mixed", "bf16-true")},
    "packing": {"concat": (), "best_fit": ("data.packing=best_fit",)},
    "average": {"none": (), "ema": ("ema.decay=0.9",)},
}
STRATEGIES = {name: (f"strategy={name}",) for name in ("ddp", "fsdp", "tp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")}
PACKED = ("causal_lm", "causal_lm + mtp", "masked_lm", "prefix_lm")


def allowed(case: Case) -> bool:
    """What is not is refused at composition, which has tests of its own."""
    if case["packing"] == "best_fit" and case["objective"] not in PACKED:
        return False
    if case.get("strategy", "").startswith("deepspeed"):
        return case["optimizer"] in ("adamw", "adam", "lion") and case["precision"] != "bf16-true" and case["average"] == "none"
    return True


def write_teacher(folder: Path) -> Path:
    if not folder.exists():
        save_pretrained(seeded(tiny(vocab_size=360)), folder)
    return folder


def overrides(case: Case, folder: Path, run: str, n: int = 1) -> list[str]:
    """Of the case's run in folder/run, which shares text and cache with the others."""
    text = documents(folder / "text")
    tables = CHOICES | {"strategy": STRATEGIES}
    chosen = [override for name, value in case.items() for override in tables[name][value]]
    path = [f"data.path={text}"] if "data=text" in chosen else []
    if case["objective"] == "sft":
        chosen += write_chats(folder / "chats")
    if "data=labels" in chosen:
        path = [f"data.path={write_labels(folder / 'labels.csv')}"]
    if case["objective"] == "distill":
        chosen.append(f"objective.teacher={write_teacher(folder / 'teacher')}")
    if case["objective"] == "dpo":
        chosen += write_preferences(folder / "preferences")
    groups = [o for o in (*chosen, *RUN) if "." not in o.split("=")[0]]
    values = {o.split("=")[0]: o for o in (*RUN, *chosen) if "." in o.split("=")[0]}
    return [*groups, *values.values(), *path, f"data.cache_dir={folder / 'cache'}", f"run_dir={folder / run}", f"trainer.devices={n}"]

"""Tiny runs for tests: a second of training on a page of text."""

import json
from pathlib import Path

from txtrain import compose
from txtrain.config.schema import Train
from txtrain.monitor.metrics_csv import EXACT, read

RUN = (
    "trainer.accelerator=cpu",
    "trainer.max_steps=12",
    "trainer.val_check_interval=5",
    "trainer.limit_val_batches=2",
    "trainer.log_every_n_steps=1",
    "save.every_n_steps=4",
    "sample.n=0",
    "data.global_batch_size=8",
    "data.val_fraction=0.2",
)
TINY = (
    "model=llama2",
    "model.n_layers=2",
    "model.dim=32",
    "model.n_heads=2",
    "model.vocab_size=257",
    "model.max_seq_len=32",
    "data=text",
    "data.tokenizer=bytes",
    "optimizer.lr=0.01",
    "scheduler.warmup_steps=4",
    *RUN,
)


def write_chats(folder: Path, n: int = 120) -> tuple[str, ...]:
    """Short conversations of one to three turns, and the overrides that read them by bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    turns = [[{"from": "human", "value": f"Q{k}?"}, {"from": "gpt", "value": f"A{k * k % 10}."}] for k in range(n)]
    rows = [{"conversations": [turn for t in range(1 + k % 3) for turn in turns[(k + t) % n]]} for k in range(n)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    each = "{% for m in messages %}{{ m.role[0] + m.content + eos_token }}{% endfor %}"
    (folder / "short.jinja").write_text(each + "{% if add_generation_prompt %}a{% endif %}")
    return "data=chat", f"data.path={folder / 'chats.jsonl'}", f"data.chat_template={folder / 'short.jinja'}", "data.tokenizer=bytes"


def write_labels(path: Path, n: int = 120, n_classes: int = 2) -> Path:
    """Short texts of 21 to 24 characters with classes from 0 on."""
    rows = [f"number {k} is an {'odd' if k % 2 else 'even'}{' one' * (k % 2)},{k % n_classes}" for k in range(100, 100 + n)]
    path.write_text("text,label\n" + "\n".join(rows) + "\n")
    return path


def write_preferences(folder: Path, n: int = 120) -> tuple[str, ...]:
    """Prompts with a good and a bad answer of several lengths, and the overrides that read them by bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": f"Q{k}", "chosen": "yes" + "!" * (k % 4), "rejected": "no" * (1 + k % 3)} for k in range(n)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "data=preferences", f"data.path={folder / 'pairs.jsonl'}", "data.tokenizer=bytes"


def write_text(path: Path) -> Path:
    """A few hundred short documents."""
    path.write_text("\n".join(f"The {i}th line says that {i} times {i % 7} is {i * (i % 7)}, which is what it is." for i in range(400)) + "\n")
    return path


def tiny(folder: Path, *overrides: str) -> Train:
    """A typed config of a tiny run on a text in `folder`; its cache lies there too."""
    text = folder / "text.txt"
    if not text.exists():
        write_text(text)
    config = compose([*TINY, f"data.path={text}", f"data.cache_dir={folder / 'cache'}", *overrides])
    assert isinstance(config, Train)
    return config


def rows(run_dir: Path) -> list[dict[str, str]]:
    """metrics.csv as text, without what the clock says."""
    return [{name: row[name] for name in EXACT} for row in read(run_dir / "metrics.csv")]


def weights(run_dir: Path) -> dict[str, bytes]:
    """Every tensor of the newest checkpoint, optimizer included."""
    import torch
    from safetensors import safe_open

    from txtrain.checkpoint.format import locate

    found: dict[str, bytes] = {}
    for shard in locate(run_dir).glob("*.safetensors"):
        with safe_open(shard, "pt") as f:
            found |= {name: f.get_tensor(name).reshape(-1).view(torch.uint8).numpy().tobytes() for name in f.keys()}  # noqa: SIM118
    return found

"""Whether GRPO makes a model use the reasoning that it has: `python -m tests.benchmarks.r1_trial FOLDER [SEED ...] [STAGE ...] [additions]`.

Chains of five operations, modulo 10. A cold start sees demonstrations of which 35 % write the running values; then 60
updates of GRPO, the same under a reward that is a coin's, and supervised fine-tuning on the right ones of as many
samples. Each stage is a run of its own in FOLDER/SEED: killed at any moment, the same command goes on. Held-out problems
are measured in the same way after each stage, and FOLDER/results.jsonl has a line for each.

`additions`: instead of chains, sums of two numbers below 100, of whose demonstrations a quarter are wrong.
"""

from __future__ import annotations

import dataclasses as dc
import json
import logging
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

import txtrain
from txtrain import compose
from txtrain.cli.main import main as cli
from txtrain.data.sources.made_problems import Arithmetic
from txtrain.data.sources.problems import Problems
from txtrain.data.sources.source import Split
from txtrain.data.tokenizer.tokenizer import byte_tokenizer
from txtrain.monitor.metrics_csv import read
from txtrain.objectives.rewards import Answer
from txtrain.run_config import AnswerConfig

FRESH = (1, 2, 3, 4, 5)  # 100 and 101 chose the settings
OPERATIONS, N_TRAIN, N_VAL, N_DEV, K = 5, 16_384, 400, 256, 8
SHAPE = (
    "model=llama2", "model.n_layers=3", "model.dim=96", "model.n_heads=4", "model.vocab_size=257",
    "model.max_seq_len=25", "model.init.std=0.06", "model.position.theta=100", "trainer.accelerator=cpu", "verbosity=quiet",
)
TASK = "data=arithmetic", f"data.difficulty={OPERATIONS}", f"data.n_train={N_TRAIN}", "data.n_val=64", "data.seq_len=25"
COLD = (
    "objective=sft", "data.global_batch_size=64", "optimizer.lr=1.5e-3", "scheduler.warmup_steps=50",
    "trainer.val_check_interval=400",
)
LEARN = (
    "objective=grpo", "objective.beta=0", "data.global_batch_size=256",
    "optimizer.lr=2e-4", "scheduler=constant", "scheduler.warmup_steps=0", "trainer.max_steps=60",
    "trainer.val_check_interval=10", f"objective.val_samples={K}", "trainer.log_every_n_steps=1",
)
REWARDS = {"grpo": (), "random": ("reward=[answer,coin]", "reward.answer.weight=0")}
N_ASKED = 60 * 32  # problems, of 8 samples each, as GRPO asks
RIGHT = (
    "objective=sft", "data=problems", "data.answer_column=text", "data.min_reward=1", "data.tokenizer=bytes",
    "data.global_batch_size=64", "optimizer.lr=1e-3", "scheduler.warmup_steps=10",
    "trainer.max_steps=240", "trainer.val_check_interval=240",
)


@txtrain.component("reward", "coin")
def coin(prompts: Sequence[str], completions: Sequence[str], samples: Sequence[Any]) -> list[float]:
    return [float(byte & 1) for byte in os.urandom(len(prompts))]


@dc.dataclass(frozen=True)
class Game:
    """task: data of GRPO; demonstrations: what the cold start has beside or instead. asked: data of rejection sampling;
    kept: the share of its right samples that is validated on. cold: steps of the cold start."""

    task: tuple[str, ...]
    demonstrations: str
    asked: tuple[str, ...]
    problems: Callable[[], Sequence[dict[str, Any]]]
    kept: float
    seq_len: int
    new: int
    pattern: str
    has_steps: bool
    cold: int = 800

    @property
    def reward(self) -> tuple[str, ...]:
        return (f'reward.answer.pattern="{self.pattern}"',)


def chains(folder: Path) -> Game:
    asked = "data=arithmetic", f"data.difficulty={OPERATIONS}", f"data.n_train={N_ASKED}", "data.n_val=1", "data.seq_len=25"
    return Game(TASK, "data.worked=0.35", asked, held_out, 0.01, 25, 12, "\\d$", has_steps=True)


def additions(folder: Path) -> Game:
    """27+45=270: the sum with its units first. Each pair has four demonstrations, whose errors are drawn apart: so no
    model can learn which are wrong."""
    draw, files = random.Random(0), {name: folder / f"{name}.jsonl" for name in ("additions", "asked")}

    def source() -> Problems:
        return Problems(str(files["additions"]), None, "question", "answer", 0.1, 200.0, 1 << 20)

    def distinct(split: Split) -> list[dict[str, Any]]:
        return list({problem["question"]: problem for problem in source().problems(split)}.values())  # type: ignore[misc]

    if not files["additions"].exists():
        pairs = [(a, b) for a in range(100) for b in range(100)] * 4
        draw.shuffle(pairs)
        shown = [a + b if draw.random() < 0.75 else draw.randrange(199) for a, b in pairs]
        rows = [
            {"question": f"{a:02}+{b:02}=", "answer": f"{a + b:03}"[::-1], "noisy": f"{value:03}"[::-1]}
            for (a, b), value in zip(pairs, shown, strict=True)
        ]
        files["additions"].write_text("".join(json.dumps(row) + "\n" for row in rows))
        files["asked"].write_text("".join(json.dumps(row) + "\n" for row in distinct("train")[:N_ASKED]))
    common = "data=problems", "data.tokenizer=bytes", "data.val_fraction=0.1", "data.seq_len=12"
    whole = (*common, f"data.path={files['additions']}", "trainer.limit_val_batches=1")
    asked = (*common, f"data.path={files['asked']}")
    # what is asked has hashes above 0.1, and one row in ninety of them below 0.11
    return Game(whole, "data.answer_column=noisy", asked, lambda: distinct("validation"), 0.11, 12, 5, "^\\d+$", has_steps=False, cold=600)


def held_out() -> list[dict[str, Any]]:
    """Problems that no run trains on; the first N_DEV are those of development."""
    return list(Arithmetic(OPERATIONS, 1, N_DEV + N_VAL, 0.0).problems("validation"))  # type: ignore[arg-type]


def measured(run_dir: Path, problems: Sequence[dict[str, Any]], game: Game) -> dict[str, float]:
    """pass@1: mean of K samples at temperature 1; forced: greedy behind the first number and a comma."""
    model, tokenizer = txtrain.load_pretrained(run_dir), byte_tokenizer()
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    answer = Answer("exact", game.pattern, None)
    assert AnswerConfig().match == "auto"  # the same for chains

    def texts(begun: list[str], **how: Any) -> list[str]:
        rows = [[*begin, *tokenizer.encode(text)] for text in begun]
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        out = txtrain.generate(model, ids, mask, max_new_tokens=game.new, eos_token_id=tokenizer.eos_id, **how)[:, ids.shape[1] :]
        made = [row.tolist() for row in out]
        return [tokenizer.decode(row[: row.index(tokenizer.eos_id)] if tokenizer.eos_id in row else row) for row in made]

    def right(found: list[str], n: int = 1) -> list[bool]:
        return [answer.is_right(text, problems[i // n]) for i, text in enumerate(found)]

    questions = [problem["question"] for problem in problems]
    sampled, greedy = texts(questions, temperature=1.0, n=K, seed=0), texts(questions)
    of_samples = right(sampled, K)
    groups = [of_samples[i : i + K] for i in range(0, len(of_samples), K)]
    found = {
        "pass@1": fmean(of_samples), f"pass@{K}": fmean(map(any, groups)), "greedy": fmean(right(greedy)),
        "length": fmean(len(text) + 1 for text in sampled),
    }
    if not game.has_steps:
        return found
    forced = texts([f"{question}{question[0]}," for question in questions])
    return found | {"steps": fmean("," in text for text in sampled), "forced": fmean(right(forced))}


def stages(folder: Path, seed: int, game: Game) -> dict[str, tuple[str, ...]]:
    cold = f"init_from={folder / 'cold'}"
    more = (f"seed={seed}", f"data.cache_dir={folder.parent / 'cache'}")
    new = f"objective.max_new_tokens={game.new}"
    learn = {name: (*SHAPE, *game.task, *LEARN, new, *game.reward, *reward, cold, *more) for name, reward in REWARDS.items()}
    right = (*SHAPE, *RIGHT, f"data.seq_len={game.seq_len}", f"data.val_fraction={game.kept}", f"data.path={folder / 'samples.jsonl'}")
    begun = (*SHAPE, *game.task, game.demonstrations, *COLD, f"trainer.max_steps={game.cold}", *more)
    return {"cold": begun, **learn, "rejection": (*right, cold, *more)}


def sample(folder: Path, seed: int, game: Game) -> None:
    """The completions that rejection sampling chooses from, as many as GRPO learns from."""
    out = folder / "samples.jsonl"
    how = (f"n={K}", "temperature=1", f"max_new_tokens={game.new}", "data.micro_batch_size=256", "data.global_batch_size=256", *game.reward)
    made = ["predict", f"checkpoint={folder / 'cold'}", *game.asked, *how, f"seed={seed}", f"out={out}", "trainer.accelerator=cpu"]
    if not out.exists() and (code := cli(made)):
        sys.exit(code)


def trial(folder: Path, seed: int, name: str, problems: Sequence[dict[str, Any]], game: Game) -> None:
    """A stage, unless it has been measured."""
    results = folder.parent / "results.jsonl"
    known = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    if any(row["seed"] == seed and row["stage"] == name for row in known):
        return
    began = time.process_time()
    if name == "rejection":
        sample(folder, seed, game)
    txtrain.train(compose([*stages(folder, seed, game)[name], f"run_dir={folder / name}"]))
    seconds = time.process_time() - began
    if json.loads((folder / name / "run.json").read_text())["status"] != "complete":
        sys.exit(75)  # told to stop: nothing to measure yet
    row = {"seed": seed, "stage": name, **measured(folder / name, problems, game), "cpu_seconds": round(seconds, 1)}
    with results.open("a") as f:
        f.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def table(results: Path) -> str:
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    names = [name for name in rows[0] if name not in ("seed", "stage", "cpu_seconds")]
    said = ["| stage | seed | " + " | ".join(names) + " |", "|---" * (2 + len(names)) + "|"]
    for stage in dict.fromkeys(row["stage"] for row in rows):
        mine = [row for row in rows if row["stage"] == stage]
        mine.append({"seed": "mean", **{name: fmean(row[name] for row in mine) for name in names}})
        said += [f"| {stage} | {row['seed']} | " + " | ".join(f"{row[name]:.2f}" for name in names) + " |" for row in mine]
    return "\n".join(said)


def curves(runs: Sequence[Path]) -> str:
    """How GRPO went, in the mean of runs: validations of held-out problems, and else up to five updates around each."""
    rows = [row for run in runs for row in read(run / "metrics.csv")]
    updates, said = [1, *range(10, 61, 10)], []
    for name in ("reward", "length", "entropy", "silent_groups", "val_pass@1", f"val_pass@{K}", "val_reward"):
        found = [[float(row[name]) for row in rows if row[name] and abs(int(row["step"]) - at) <= 2] for at in updates]
        said.append(f"| {name} | " + " | ".join(f"{fmean(values):.2f}" if values else "" for values in found) + " |")
    return "\n".join(["| update | " + " | ".join(map(str, updates)) + " |", "|---" * (1 + len(updates)) + "|", *said])


def main() -> None:
    folder, words = Path(sys.argv[1]), sys.argv[2:]
    seeds = [int(word) for word in words if word.isdigit()] or FRESH
    names = [word for word in words if not word.isdigit() and word != "additions"] or ["cold", "grpo", "random", "rejection"]
    folder.mkdir(parents=True, exist_ok=True)
    logging.disable(logging.INFO)
    game = additions(folder) if "additions" in words else chains(folder)
    problems = game.problems()[: N_DEV + N_VAL]
    for name in names:
        for seed in seeds:  # those that chose the settings are measured on other problems
            trial(folder / str(seed), seed, name, problems[:N_DEV] if seed >= 100 else problems[N_DEV:], game)
    print(table(folder / "results.jsonl"))
    if runs := [folder / str(seed) / "grpo" for seed in seeds if (folder / str(seed) / "grpo").exists()]:
        print(curves(runs))


if __name__ == "__main__":
    main()

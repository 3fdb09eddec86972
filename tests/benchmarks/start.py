"""From a command to its first answer: `--help`, `plan`, a first update beside the peers', a first token beside what it cannot do without.

    python -m tests.benchmarks.start [help] [plan] [update] [generate] [--rounds 2] [--nanogpt FOLDER]

CPU seconds of the whole process, which ends after one update, the least of the rounds, sides in turns. The update: GPT-2's shape with 4 layers and
dim 128, on 8 x 128 tokens of ids at hand; theirs save nothing, and litgpt does not compile.
generate: against `import torch` and reading the same weights by safetensors. peers: as in peers.py.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from tests.benchmarks.peers import NANOGPT

ROOT = Path(__file__).parents[2]
SMALL = ["model=gpt2", "model.n_layers=4", "model.dim=128", "model.n_heads=4", "model.vocab_size=8192", "data.seq_len=128", "data.global_batch_size=8"]
SMALL += ["trainer.limit_val_batches=0", "trainer.accelerator=cpu", "sample.n=0", "trainer.max_steps=1", "save.every_n_steps=1000"]

TRANSFORMERS = """
import datasets, torch
from transformers import AutoModelForCausalLM, GPT2Config, Trainer, TrainingArguments, default_data_collator
model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=8192, n_layer=4, n_embd=128, n_head=4, n_positions=128))
ids = torch.randint(0, 8192, (8, 128)).tolist()
data = datasets.Dataset.from_dict({"input_ids": ids, "labels": ids})
how = TrainingArguments(output_dir="out", max_steps=1, save_strategy="no", report_to="none", use_cpu=True, per_device_train_batch_size=8)
Trainer(model=model, args=how, train_dataset=data, data_collator=default_data_collator).train()
"""
LITGPT = """
import sys
from pathlib import Path
import torch
from litgpt import Config
from litgpt.args import EvalArgs, TrainArgs
from litgpt.data import DataModule
from litgpt.pretrain import setup
class Ids(DataModule):
    def connect(self, tokenizer=None, batch_size=1, max_seq_length=None):
        self.n = batch_size
    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.randint(0, 8192, (64, 129)), batch_size=self.n)
    val_dataloader = train_dataloader
sys.argv = ["litgpt", "small"]  # it writes down what was typed
config = Config(name="small", block_size=128, vocab_size=8192, padded_vocab_size=8192, n_layer=4, n_head=4, n_embd=128)
train = TrainArgs(save_interval=None, log_interval=1, global_batch_size=8, micro_batch_size=8, max_tokens=8 * 128, lr_warmup_steps=0, max_norm=1.0, max_seq_length=128)
setup("small", config, Path("out"), "32-true", data=Ids(), train=train, eval=EvalArgs(interval=1000, max_iters=1), devices=1, logger_name="csv")
"""
NANOGPT_FLAGS = "--device=cpu --compile=False --eval_interval=1000 --eval_iters=1 --max_iters=0 --log_interval=1 --block_size=128 --batch_size=8"
NANOGPT_FLAGS += " --n_layer=4 --n_head=4 --n_embd=128 --gradient_accumulation_steps=1 --dtype=float32 --dataset=ids"
FLOOR = """
import torch
from safetensors.torch import load_file
load_file(%r)
"""


def cpu_of(command: list[str], folder: Path) -> float:
    """CPU seconds of a command, whose output is shown where it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "", "TORCHDYNAMO_DISABLE": "1"}
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if found.returncode:
        raise OSError(f"ended with {found.returncode}: {found.stderr[-600:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def txtrain(*words: str) -> list[str]:
    return [sys.executable, "-m", "txtrain", *words]


def commands(what: str, folder: Path, nanogpt: Path) -> dict[str, list[str]]:
    """The sides of one row, ours first; one that begins with a folder of its own each time."""
    python = [sys.executable, "-c"]
    if what == "help":
        return {"--help": txtrain("--help")}
    if what == "plan":
        return {"plan of 671B": txtrain("plan", "model=deepseek_r1_671b")}
    if what == "generate":
        weights = max(folder.glob("run/**/*.safetensors"), key=lambda p: p.stat().st_size)
        return {"first token": txtrain("generate", "checkpoint=run", "prompt=The", "max_new_tokens=1"), "the import and the weights": [*python, FLOOR % str(weights)]}
    (folder / "data/ids").mkdir(parents=True, exist_ok=True)
    for name in ("train", "val"):
        np.random.default_rng(0).integers(0, 8192, 10_000, dtype=np.uint16).tofile(folder / f"data/ids/{name}.bin")
    sides = {"first update": txtrain(*SMALL, "data=memmap", "data.path=data/ids"), "transformers": [*python, TRANSFORMERS], "litgpt": [*python, LITGPT]}
    for file in nanogpt.glob("*.py"):  # it runs where its files are
        shutil.copy(file, folder)
    return sides | {"nanoGPT": [sys.executable, "train.py", *NANOGPT_FLAGS.split()]}


def seconds(what: str, rounds: int, nanogpt: Path = NANOGPT) -> dict[str, float]:
    """The least of each side. A peer that does not run is said and left out."""
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if what == "generate":
            cpu_of(txtrain(*SMALL, "data=python_docs", "run_dir=run"), folder)
        sides = commands(what, folder, nanogpt)
        for i in range(rounds + 1):  # the first round warms the caches
            for side, command in list(sides.items()):
                try:
                    took = cpu_of(command + ([f"run_dir=update_{i}"] if side == "first update" else []), folder)
                except OSError as e:
                    if side == next(iter(sides)):
                        raise
                    print(f"{side} is left out: {e}", flush=True)
                    del sides[side]
                    continue
                found[side] = min(took, found[side]) if i > 1 else took
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", nargs="*", default=["help", "plan", "update", "generate"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--nanogpt", type=Path, default=NANOGPT)
    given = parser.parse_args()
    for what in given.what:
        found = seconds(what, given.rounds, given.nanogpt)
        print("   ".join(f"{side} {took:.2f} s" for side, took in found.items()), flush=True)


if __name__ == "__main__":
    main()

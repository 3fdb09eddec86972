"""objective=distill: divergences by hand, values and gradients; chunks; bins; runs with a teacher."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cases import some
from tests.models import shake, tiny
from tests.training import RUN, write_chats, write_text
from tests.unit.objectives.conftest import SHAPE
from txtrain.cli.main import main
from txtrain.config.schema import Train
from txtrain.errors import ConfigError
from txtrain.model.build import build_model
from txtrain.model.head import loss as head_loss
from txtrain.monitor.metrics_csv import read
from txtrain.objectives.base import IGNORED
from txtrain.objectives.distill import Distill
from txtrain.training import teach
from txtrain.training.run import train


def models(softcap: float | None = None, tied: bool = True) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A student, and a larger teacher, in float64."""
    torch.manual_seed(0)
    shape = {"logit_softcap": softcap, "tie_word_embeddings": tied}
    student, teacher = (shake(build_model(tiny(dim=dim, **shape)), seed).double() for seed, dim in ((1, 32), (2, 64)))
    return student, teacher.requires_grad_(False).eval()


def batch_of(n: int = 3, length: int = 20) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 61, (n, length), generator=generator)
    labels = ids.masked_fill(torch.rand(n, length, generator=generator) < 0.3, IGNORED)
    return {"input_ids": ids, "labels": labels, "document_ids": (torch.arange(length) // 9).expand(n, -1)}


def gradients(model: torch.nn.Module) -> torch.Tensor:
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return flat


def by_hand(student: torch.nn.Module, teacher: torch.nn.Module, batch: dict[str, torch.Tensor], *, reverse: bool, t: float, k: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Divergence times t^2 and cross-entropy, means over the targets, from whole logits."""
    z, y = (model(input_ids=batch["input_ids"], document_ids=batch["document_ids"]).logits[:, :-1] for model in (student, teacher))
    targets = batch["labels"][:, 1:]
    p, q = (y / t).softmax(-1), (z / t).softmax(-1)
    if k is not None:
        places = p.topk(k, dim=-1).indices
        p, q = (torch.cat((one.gather(-1, places), 1 - one.gather(-1, places).sum(-1, keepdim=True)), -1) for one in (p, q))
    a, b = (q, p) if reverse else (p, q)
    kl = (a * (a / b).log()).sum(-1)[targets != IGNORED].mean() * t**2
    return kl, torch.nn.functional.cross_entropy(z.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize(("t", "hard", "k", "softcap"), [(1.0, 0.0, None, None), (2.5, 0.3, None, 3.0), (2.5, 0.3, 7, None), (0.7, 0.5, 7, 3.0)])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_loss_and_gradients_are_those_of_the_formulas(reverse: bool, t: float, hard: float, k: int | None, softcap: float | None, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In two micro-batches, and in chunks of a few tokens."""
    monkeypatch.setattr(head_loss, "CHUNK_ELEMENTS", 61 * 7)
    monkeypatch.setattr(head_loss, "CHUNK_ROWS", 1)
    (student, teacher), batch = models(softcap, tied), batch_of()
    objective = Distill(kl="reverse" if reverse else "forward", temperature=t, hard_weight=hard, top_k=k)
    objective.models = {"teacher": teacher}
    counts, total, told = objective.denominators(batch), 0.0, {"kl_loss": 0.0, "hard_loss": 0.0}
    for half in (slice(0, 1), slice(1, 3)):
        terms = objective(student, {name: value[half] for name, value in batch.items()}, counts)
        objective.total(terms).backward()
        total += terms["loss"].item()
        told = {name: value + terms[name].item() for name, value in told.items()}
    ours = gradients(student)
    kl, ce = by_hand(student, teacher, batch, reverse=reverse, t=t, k=k)
    ((1 - hard) * kl + hard * ce).backward()
    assert kl.item() > 0.05
    assert told == pytest.approx({"kl_loss": kl.item(), "hard_loss": ce.item()}, abs=1e-6)
    assert total == pytest.approx(((1 - hard) * kl + hard * ce).item(), abs=1e-6)
    theirs = gradients(student)
    assert torch.allclose(ours, theirs, atol=1e-6), (ours - theirs).abs().max()


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_top_k_of_the_whole_vocabulary_is_the_whole_distribution(reverse: bool) -> None:
    (student, teacher), batch = models(), batch_of()
    found = []
    for k in (None, 61):
        objective = Distill(kl="reverse" if reverse else "forward", temperature=2.0, hard_weight=0.0, top_k=k)
        objective.models = {"teacher": teacher}
        terms = objective(student, batch, objective.denominators(batch))
        terms["loss"].backward()
        found.append((terms["loss"].item(), gradients(student)))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-7)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-9)


def test_the_gradient_at_a_high_temperature_is_that_of_the_logits_difference() -> None:
    """Hinton et al., section 2.1: with centred logits it is (z - v) / V for each token, whatever the temperature: hence t^2."""
    from txtrain.model.head.distillation import Distillation, _chunk

    z, v = (torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    z, v, t = z - z.mean(-1, keepdim=True), v - v.mean(-1, keepdim=True), 1e4
    how = Distillation(False, t, 0.0, torch.tensor(1.0), lambda use: None)
    _, grad = _chunk(z, torch.zeros(4, dtype=torch.long), (v / t).log_softmax(-1), head_loss.Vocabulary(), how)
    assert torch.allclose(grad, (z - v) / 9, atol=1e-4)


def test_memory_of_the_loss_is_that_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor has as many elements as all logits."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            made = func(*args, **(kwargs or {}))
            for x in made if isinstance(made, (tuple, list)) else (made,):
                largest = max(largest, x.numel() if isinstance(x, torch.Tensor) else 0)
            return made

    monkeypatch.setattr(head_loss, "CHUNK_ELEMENTS", 5 * 4000)
    monkeypatch.setattr(head_loss, "CHUNK_ROWS", 1)
    torch.manual_seed(0)
    student, teacher = (build_model(tiny(vocab_size=4000, dim=8, n_heads=2, n_layers=1)) for _ in range(2))
    objective = Distill(temperature=2.0)
    objective.models = {"teacher": teacher.requires_grad_(False)}
    batch = {name: value % 61 for name, value in batch_of(4, 40).items()}
    with Sizes():
        objective(student, batch, objective.denominators(batch))["loss"].backward()
    assert largest <= 8 * 4000 < 4 * 40 * 4000, largest


def teacher_of(config: Callable[..., Train], folder: Path) -> Train:
    made = config("sft", "objective=causal_lm", f"run_dir={folder}", "trainer.max_steps=8")
    train(made)
    return made


def test_a_student_learns_from_a_run_and_another_tokenizer_is_refused(config: Callable[..., Train], tmp_path: Path) -> None:
    teacher_of(config, tmp_path / "teacher")
    given = ("objective=distill", f"objective.teacher={tmp_path / 'teacher'}", "objective.hard_weight=0.2", "model.n_layers=1")
    train(config("sft", *given))
    told = read(tmp_path / "run" / "metrics.csv")
    for row in told[:2]:
        assert float(row["loss"]) == pytest.approx(0.8 * float(row["kl_loss"]) + 0.2 * float(row["hard_loss"]), abs=1e-5)
    assert float(told[-1]["val_kl_loss"]) < float(told[0]["kl_loss"])
    checkpoint = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    assert "teacher" not in json.dumps(json.loads((checkpoint / "state.json").read_text()))
    for more, said in ((["model.vocab_size=401"], "must be a model of 401 tokens"), (["data.tokenizer=train"], "must have the tokenizer of the data")):
        made = config("sft", *given, *more, f"run_dir={tmp_path / 'other'}")
        with pytest.raises(ConfigError) as refused:
            train(made)
        assert said in str(refused.value)
        assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("packing", some(["best_fit", "concat"], ["best_fit"]))
def test_what_a_teacher_said_ahead_of_time_is_what_it_says_at_each_step(config: Callable[..., Train], tmp_path: Path, packing: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`prepare` beside the tokens of chats, padded, and of text, cut anywhere; written in part and gone on with."""
    teacher_of(config, tmp_path / "teacher")
    shape = ["model=gpt2", "model.vocab_size=400", "model.max_seq_len=48", "data.seq_len=32", *SHAPE, *RUN, "trainer.max_steps=4"]
    chats, text = write_chats(tmp_path / "chats"), ("data=text", f"data.path={write_text(tmp_path / 'a.txt')}", "data.tokenizer=bytes")
    source = [*(chats if packing == "best_fit" else text), f"data.cache_dir={tmp_path / 'cache'}"]
    given = ["objective=distill", "objective.temperature=1.5", "objective.top_k=5", f"data.packing={packing}"]
    online, ready = [*shape, *given, *source, f"objective.teacher={tmp_path / 'teacher'}"], tmp_path / "ready"
    with monkeypatch.context() as patch:
        patch.setattr(teach, "_EVERY", 0.0)
        patch.setattr(teach, "_likeliest", failing(teach._likeliest, after=2))
        with pytest.raises(RuntimeError, match="stopped here"):
            main(["prepare", *online, f"out={ready}"])
    assert json.loads((ready / "teacher-state.json").read_text())["done"]["train"] == 16
    assert not (ready / "teacher.json").exists()
    assert main(["prepare", *online, f"out={ready}"]) == 0
    assert not (ready / "teacher-state.json").exists()
    offline = [*shape, *given, "data=memmap", f"data.path={ready}", f"data.cache_dir={tmp_path / 'cache'}"]
    assert main([*online, f"run_dir={tmp_path / 'online'}"]) == 0
    assert main([*offline, f"run_dir={tmp_path / 'offline'}"]) == 0
    columns = ("loss", "kl_loss", "val_loss", "grad_norm")
    ours, theirs = ([float(row[c]) for row in read(tmp_path / run / "metrics.csv") for c in columns if row[c]] for run in ("online", "offline"))
    assert ours == pytest.approx(theirs, abs=2e-6)
    capsys.readouterr()
    for more, said in (("objective.top_k=6", "`objective.top_k` must be 5"), ("objective.temperature=1", "`objective.temperature` must be 1.5"), ("data.seq_len=40", "`data.seq_len` must be 32")):
        assert main([*offline, more, f"run_dir={tmp_path / 'other'}"]) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "other").exists()


def failing(work: Callable[..., Any], after: int) -> Callable[..., Any]:
    """The function, which fails when it has been called so often."""
    left = iter(range(after))

    def once(*args: Any) -> Any:
        if next(left, None) is None:
            raise RuntimeError("stopped here")
        return work(*args)

    return once


def test_what_does_not_fit_is_refused(config: Callable[..., Train]) -> None:
    for given, said in (
        ((), "`objective.teacher` must be given"),
        (("objective.teacher=x", "objective.top_k=401"), "`objective.top_k` must be at most model.vocab_size (400)"),
        (("objective.teacher=x", "objective.top_k=4", "strategy=tp"), "`objective.top_k` must be null with strategy=tp"),
    ):
        with pytest.raises(ConfigError) as refused:
            config("sft", "objective=distill", *given)
        assert said in str(refused.value)

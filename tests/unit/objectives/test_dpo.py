"""objective=dpo: formulas by hand, pairs packed and alone, the reference, and runs that stop and resume."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from txtrain.cli.main import main
from txtrain.config.schema import Train
from txtrain.errors import ConfigError
from txtrain.model.build import build_model
from txtrain.monitor.metrics_csv import read
from txtrain.objectives.base import build_objective
from txtrain.training.data_module import DataModule
from txtrain.training.run import train

IGNORED = -100


def two_models(config: Train) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A policy and its reference, in float64."""
    torch.manual_seed(0)
    policy, reference = build_model(config.model).double(), build_model(config.model).double()
    return policy, reference.requires_grad_(False).eval()


def gradients(model: torch.nn.Module) -> torch.Tensor:
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return flat


def answers(batch: dict[str, torch.Tensor]) -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """The pairs of a batch: ([ids, labels] of the chosen answer, of the rejected one), without padding."""
    found = []
    for ids, labels, documents, mask in zip(*(batch[n] for n in ("input_ids", "labels", "document_ids", "attention_mask")), strict=True):
        sides = [[ids[documents == d], labels[documents == d]] for d in documents[mask == 1].unique().tolist()]
        found += list(zip(sides[::2], sides[1::2], strict=True))
    return found


def log_prob(model: torch.nn.Module, side: list[torch.Tensor]) -> torch.Tensor:
    """Of one answer alone, from whole logits."""
    ids, labels = side
    logits = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
    chosen = labels[1:] != IGNORED
    return logits[chosen].gather(1, labels[1:][chosen][:, None]).sum()


def by_hand(policy: Any, reference: Any, batch: dict[str, torch.Tensor], beta: float, e: float, ipo: bool, sft: float) -> tuple[torch.Tensor, list[float]]:
    """The loss of the pairs one by one (2305.18290, equation 7; 2310.12036, equation 17), and their margins."""
    total, nll, n_tokens, margins = torch.zeros(()).double(), torch.zeros(()).double(), 0, []
    pairs = answers(batch)
    for chosen, rejected in pairs:
        h = log_prob(policy, chosen) - log_prob(reference, chosen) - (log_prob(policy, rejected) - log_prob(reference, rejected))
        if ipo:
            total = total + (h - 1 / (2 * beta)) ** 2
        else:
            p = 1 / (1 + torch.exp(-beta * h))
            total = total - (1 - e) * p.log() - e * (1 - p).log()
        nll, n_tokens = nll - log_prob(policy, chosen), n_tokens + int((chosen[1][1:] != IGNORED).sum())
        margins.append(beta * h.item())
    return total / len(pairs) + sft * nll / n_tokens, margins


@pytest.mark.parametrize("packing", ["best_fit", "none"])
@pytest.mark.parametrize(
    ("given", "e", "ipo", "sft"),
    [((), 0.0, False, 0.0), (("objective.label_smoothing=0.2", "objective.sft_weight=0.7"), 0.2, False, 0.7), (("objective.loss=ipo",), 0.0, True, 0.0)],
    ids=["sigmoid", "smoothed with sft", "ipo"],
)
def test_loss_and_gradients_are_those_of_the_pairs_one_by_one(config: Callable[..., Train], packing: str, given: tuple[str, ...], e: float, ipo: bool, sft: float) -> None:
    made = config("dpo", f"data.packing={packing}", "objective.beta=0.3", *given)
    batch, _ = next(DataModule(made).first(8))
    policy, reference = two_models(made)
    objective = build_objective(made)
    objective.models = {"reference": reference}
    counts = objective.denominators(batch)
    halves = [{name: value[half] for name, value in batch.items()} for half in (slice(0, 3), slice(3, 8))]
    shares = [objective(policy, half, counts) for half in halves]
    together = sum(objective.total(share) for share in shares)
    together.backward()
    of_batch = gradients(policy)

    alone, margins = by_hand(policy, reference, batch, 0.3, e, ipo, sft)
    alone.backward()
    assert int(counts["loss"]) == len(margins) == len(answers(batch))
    assert packing == "none" or len(margins) > 8
    assert together.item() == pytest.approx(alone.item(), abs=1e-6)
    assert torch.allclose(of_batch, gradients(policy), atol=1e-6)
    told = {name: sum(share[name].item() for share in shares) for name in objective.terms}
    assert told["reward_margin"] == pytest.approx(sum(margins) / len(margins), abs=1e-6)
    assert told["reward_accuracy"] == pytest.approx(sum(m > 0 for m in margins) / len(margins))
    assert told["reward_chosen"] - told["reward_rejected"] == pytest.approx(told["reward_margin"], abs=1e-6)
    for k, name in enumerate(("length_chosen", "length_rejected")):
        lengths = [int((pair[k][1] != IGNORED).sum()) for pair in answers(batch)]
        assert told[name] == pytest.approx(sum(lengths) / len(lengths))


def test_values_of_one_pair_worked_out_on_paper(config: Callable[..., Train]) -> None:
    """policy -2 and -3, reference -2.5 and -2: h = 0.5 + 1 = 1.5."""
    policy, reference = torch.tensor([[[-2.0, -3.0]]]), torch.tensor([[[-2.5, -2.0]]])
    lengths = torch.tensor([[[2, 3]]])
    plain = build_objective(config("dpo", "objective.beta=0.2"))._sums(policy, reference, lengths, 0.1)
    assert plain["loss"].item() == pytest.approx(0.9 * math.log(1 + math.exp(-0.3)) + 0.1 * math.log(1 + math.exp(0.3)), abs=1e-6)
    ipo = build_objective(config("dpo", "objective.beta=0.2", "objective.loss=ipo"))._sums(policy, reference, lengths, 0.0)
    assert ipo["loss"].item() == pytest.approx((1.5 - 2.5) ** 2, abs=1e-5)
    assert plain["reward_margin"].item() == pytest.approx(0.3, abs=1e-6)


def test_prompts_are_not_trained_and_are_what_generate_reads(config: Callable[..., Train]) -> None:
    data = DataModule(config("dpo"))
    batch, _ = next(data.first(4))
    for chosen, rejected in answers(batch):
        for ids, labels in (chosen, rejected):
            n = int((labels != IGNORED).nonzero()[0])
            prompt, answer = data.tokenizer.decode(ids[:n].tolist()), data.tokenizer.decode(ids[n:].tolist())
            assert prompt.startswith("Q")
            assert prompt[1:].isdigit()
            assert answer.startswith("yes" if ids is chosen[0] else "no")
            assert ids[0] == ids[-1] == data.tokenizer.eos_id
            assert torch.equal(labels[n:], ids[n:])


@pytest.mark.parametrize("reference", ["initial", "cached"])
def test_a_run_learns_to_prefer_and_its_reference_stays(config: Callable[..., Train], tmp_path: Path, reference: str) -> None:
    made = config("dpo", f"objective.reference={reference}", "objective.beta=0.5", "trainer.max_steps=8")
    train(made)
    told = read(tmp_path / "run" / "metrics.csv")
    assert float(told[0]["loss"]) == pytest.approx(math.log(2), abs=1e-6)
    assert float(told[-1]["reward_accuracy"]) > 0.9
    assert float(told[-1]["loss"]) < 0.4
    assert {"reward_margin", "val_reward_accuracy", "length_chosen", "val_length_rejected"} <= told[0].keys()


def test_evaluate_says_that_the_reference_is_not_there(config: Callable[..., Train], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(config("dpo", "trainer.max_steps=1"))
    assert main(["evaluate", f"checkpoint={tmp_path / 'run'}"]) == 2
    assert "is dpo instead, which reads another model beside it. Its values are in the run's metrics.csv" in capsys.readouterr().err


def test_the_cached_reference_is_the_online_one(config: Callable[..., Train], tmp_path: Path) -> None:
    losses = []
    for reference in ("initial", "cached"):
        made = config("dpo", f"objective.reference={reference}", f"run_dir={tmp_path / reference}", "trainer.max_steps=5")
        train(made)
        losses.append([float(row["loss"]) for row in read(tmp_path / reference / "metrics.csv")])
    assert losses[0] == pytest.approx(losses[1], abs=2e-7)


def test_what_does_not_fit_is_refused(config: Callable[..., Train]) -> None:
    for given, said in (
        (["objective.loss=ipo", "objective.label_smoothing=0.1"], "`objective.label_smoothing` must be 0"),
        (["data.cross_document_attention=true"], "`data.cross_document_attention` must be false"),
        (["objective=sft"], "`data` must be a source of chat or problems with objective=sft"),
    ):
        with pytest.raises(ConfigError) as refused:
            config("dpo", *given)
        assert said in str(refused.value)

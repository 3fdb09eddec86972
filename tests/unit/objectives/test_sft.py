"""objective=sft: the loss of packed answers is that of the answers one by one."""

from collections.abc import Callable

import pytest
import torch

from txtrain.config.schema import Train
from txtrain.model.build import build_model
from txtrain.objectives.base import build_objective
from txtrain.training.data_module import DataModule

IGNORED = -100


def gradients(model: torch.nn.Module) -> torch.Tensor:
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return flat


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_a_packed_batch_has_the_loss_and_gradients_of_its_conversations_one_by_one(
    config: Callable[..., Train], packing: str
) -> None:
    made = config("sft", f"data.packing={packing}", "data.global_batch_size=8")
    data, objective = DataModule(made), build_objective(made)
    batch, _ = next(data.first(8))
    torch.manual_seed(0)
    model = build_model(made.model).double()
    given = {name: batch[name] for name in ("input_ids", "labels", "document_ids", "attention_mask")}
    counts = objective.denominators(given)

    halves = [
        {name: value[half] for name, value in given.items()} for half in (slice(0, 3), slice(3, 8))
    ]  # two micro-batches
    together = torch.stack([objective(model, half, counts)["loss"] for half in halves]).sum()
    together.backward()
    of_batch = gradients(model)

    total, n = torch.zeros(()).double(), 0
    for ids, labels, documents in zip(given["input_ids"], given["labels"], given["document_ids"], strict=True):
        for number in documents.unique().tolist():
            one, targets = ids[documents == number], labels[documents == number][1:]
            if not (targets != IGNORED).any():
                continue  # padding
            logits = model(input_ids=one[None]).logits[0, :-1]
            total = total + torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
            n += int((targets != IGNORED).sum())
    (total / n).backward()
    assert n == int(counts["loss"])
    assert together.item() == pytest.approx(total.item() / n, abs=1e-6)
    assert torch.allclose(of_batch, gradients(model), atol=1e-6)


def test_what_is_shown_begins_where_the_answer_does(config: Callable[..., Train]) -> None:
    data = DataModule(config("sft"))
    asked = data.before_trained(2)
    assert [data.tokenizer.decode(ids, special=True)[-1] for ids in asked] == ["a", "a"]
    assert all(data.tokenizer.decode(ids, special=True).startswith("uQ") for ids in asked)

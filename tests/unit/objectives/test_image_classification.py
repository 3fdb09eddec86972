import torch
import torch.nn.functional as F

from txtrain.objectives.image_classification import ImageClassification, n_among

LOGITS = torch.tensor([[3.0, 2, 1, 0, -1, -2], [0, 1, 2, 3, 4, 5]])


class Fixed:
    def __call__(self, pixel_values):
        class Output:
            logits = LOGITS[: len(pixel_values)]

        return Output


def test_top_1_and_top_5_and_the_plain_loss():
    batch = {"pixel_values": torch.zeros(2, 1, 2, 2), "labels": torch.tensor([0, 1])}
    found = ImageClassification(label_smoothing=0.2).validate(Fixed(), batch)
    assert {name: (float(total), int(n)) for name, (total, n) in found.items() if name != "loss"} == {"top1": (1.0, 2), "top5": (2.0, 2)}
    assert torch.allclose(found["loss"][0], F.cross_entropy(LOGITS, batch["labels"], reduction="sum"))
    assert int(n_among(LOGITS, torch.tensor([5, 0]), 5)) == 0
    assert int(n_among(LOGITS[:, :3], torch.tensor([2, 0]), 5)) == 2, "of three classes, all are among the best five"


def test_the_loss_is_torchs_over_the_global_batch():
    batch = {"pixel_values": torch.zeros(2, 1, 2, 2), "labels": torch.tensor([0, 1])}
    objective = ImageClassification(label_smoothing=0.2)
    loss = objective(Fixed(), batch, objective.denominators(batch))["loss"]
    assert torch.allclose(loss, F.cross_entropy(LOGITS, batch["labels"], label_smoothing=0.2))

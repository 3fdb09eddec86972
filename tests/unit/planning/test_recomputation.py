"""What activation checkpointing computes again: in closed form what torch counts."""

import dataclasses as dc

import pytest
from torch.utils.checkpoint import set_checkpoint_early_stop

from tests.cases import some
from tests.models import seeded, tiny
from tests.unit.planning.test_figures import BATCH, MLA, MOE, counted, inputs
from txtrain.model import flops
from txtrain.parallel.activation_checkpointing import wrap_blocks

MODELS = {
    "decoder": {"n_layers": 3},
    "windows": {"n_layers": 3, "attention": {"window": (4, None)}},
    "encoder": {"topology": "encoder", "norm_position": "post", "n_layers": 3},
    "two stacks": {"topology": "encoder_decoder", "n_layers": 2, "n_encoder_layers": 3},
    "experts, latent attention and further tokens": {"ffn": MOE, "attention": MLA, "n_layers": 3, "mtp_depth": 2},
}


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full", 1, 2, 3])
@pytest.mark.parametrize("name", some(MODELS, ("windows", "two stacks")))
def test_it_equals_what_is_counted(name, checkpointing):
    changes = dict(MODELS[name])
    if isinstance(changes.get("attention"), dict):
        changes["attention"] = dc.replace(tiny().attention, **changes["attention"])
    config = tiny(**changes)
    plain, model = seeded(config), seeded(config)
    wrap_blocks(model, checkpointing, compiled=False)
    given = inputs(config, 12, 7)
    with set_checkpoint_early_stop(False):  # else the last product is left out where nothing behind it keeps what it gave
        more = counted(model, given)[1] - counted(plain, given)[1]
    again = flops.recomputed_flops(config, 12, 7, checkpointing=checkpointing, dense=True)
    assert more == round(BATCH * again)
    assert (again > 0) == (checkpointing not in ("none", "selective"))
    assert config.recomputed_flops(12, 7, checkpointing) <= again, "a window counts as its width"

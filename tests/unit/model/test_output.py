import torch
from torch.utils import _pytree

from txtrain.model.output import ModelOutput


def test_absent_fields_do_not_count():
    out = ModelOutput(logits=torch.zeros(1), last_hidden_state=torch.ones(1))
    assert out.loss is None
    assert out[0] is out.logits
    assert out.to_tuple() == (out.logits,)
    assert out["last_hidden_state"] is out.last_hidden_state
    assert out.keys() == ["logits", "last_hidden_state"]
    assert "loss" not in out


def test_sharding_hooks_find_the_tensors_inside():
    out = ModelOutput(loss=torch.zeros(1), logits=torch.ones(2))
    assert len([x for x in _pytree.tree_leaves(out) if torch.is_tensor(x)]) == 2

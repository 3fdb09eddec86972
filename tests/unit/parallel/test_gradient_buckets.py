"""What is exchanged while a backward goes on, with one process in place of several."""

import pytest
import torch
import torch.distributed as dist

from tests.models import ids, seeded, shake, tiny
from txtrain.model import options
from txtrain.parallel.gradient_buckets import GradientBuckets, as_read

learned, relative = options.LearnedConfig(type="learned"), options.RelativeConfig(type="relative")
MODELS = {
    "decoder": {"tie_word_embeddings": False},
    "tied head": {"position": learned},
    "two stacks": {"topology": "encoder_decoder", "position": relative, "pad_token_id": 0},
    "further token": {"mtp_depth": 1},
}


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_on_their_way_before_the_last_ones_are_there(name, group):
    """All but what is read first: embeddings, positions, and (where it is tied) the head."""
    model = shake(seeded(tiny(**MODELS[name])))
    parameters = as_read(model)
    assert sorted(map(id, parameters)) == sorted(map(id, model.parameters()))
    sent, seen, last = {}, {}, model.embedding.token.weight
    for order, given in (("as read", parameters), ("as named", list(model.parameters()))):
        model.zero_grad(set_to_none=True)
        made = []

        def look(_, order=order, made=made):
            (buckets,) = made
            sent[order] = sum(p.numel() for bucket in buckets._buckets[: len(buckets._sent)] for p in bucket)

        looking = last.register_post_accumulate_grad_hook(look)
        buckets = GradientBuckets(given, group, bucket_bytes=1)
        made.append(buckets)
        buckets.active = True
        out = model(ids(), labels=ids(), return_logits=False)
        (out.loss + sum(out.mtp_losses or ())).backward()
        looking.remove()
        buckets.finish()
        seen[order] = [p.grad.clone() for p in model.parameters()]
    assert all(map(torch.equal, *seen.values()))
    first = sum(p.numel() for key, p in model.named_parameters() if "embedding" in key or "position" in key)
    total = sum(p.numel() for p in parameters)
    print(f"{name}: of {total} values {sent['as read']} are sent before the last gradient is there, in the order of their names {sent['as named']}")
    assert sent["as read"] >= total - first
    assert sent["as named"] < sent["as read"] / 2

import pytest
import torch

from tests.models import ids, seeded, tiny
from txtrain.model import options
from txtrain.model.attention.cache import GROWTH, LayerCache


@pytest.mark.parametrize("window", [None, 1, 2, 5, 300])
@pytest.mark.parametrize("chunks", [[1] * 40, [7, 1, 1, 30, 2, 1], [50] + [1] * 700])
def test_update_returns_what_the_window_may_need(window, chunks):
    cache, written = LayerCache(window), torch.zeros(1, 2, 0, 3)
    for i, n in enumerate(chunks):
        new = torch.randn(1, 2, n, 3, generator=torch.Generator().manual_seed(i))
        written = torch.cat((written, new), 2)
        (got,) = cache.update(new)
        held = written.shape[2] if window is None else min(written.shape[2], n + window - 1)
        assert torch.equal(got, written[:, :, -held:])


def test_a_windowed_cache_does_not_grow_with_the_text():
    cache = LayerCache(window=8)
    for _ in range(1000):
        cache.update(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4))
    assert sum(b.nbytes for b in cache.buffers) == 2 * 4 * 4 * (7 + 8)
    cache = LayerCache(window=8)
    cache.update(torch.zeros(1, 1, 500, 4))
    cache.update(torch.zeros(1, 1, 1, 4))
    assert sum(b.nbytes for b in cache.buffers) == 4 * 4 * (7 + 8), "the buffer of a long prompt is let go"


def test_an_open_cache_grows_by_blocks():
    cache = LayerCache()
    cache.update(torch.zeros(1, 1, 10, 4))
    assert cache.buffers[0].shape[2] == 10 + GROWTH


def test_select_keeps_rows_in_order():
    model = seeded(tiny(attention=options.AttentionConfig(type="mha", window=(4, None)))).eval()
    tokens = ids(batch=3)
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    rows = torch.tensor([2, 1])
    with torch.no_grad():
        whole = model(tokens, attention_mask=mask, position_ids=positions).logits
        past = model(tokens[:, :10], attention_mask=mask[:, :10], position_ids=positions[:, :10], use_cache=True).past_key_values
        past.select(rows)
        rest = model(tokens[rows, 10:], attention_mask=mask[rows], position_ids=positions[rows, 10:], past_key_values=past).logits
    torch.testing.assert_close(rest, whole[rows, 10:], rtol=1e-4, atol=1e-4)


def test_contradictions_are_refused():
    model, tokens = seeded(tiny()), ids()
    past = model(tokens, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="document_ids"):
        model(tokens, document_ids=torch.zeros_like(tokens), past_key_values=past)
    with pytest.raises(ValueError, match="`attention_mask` must have 16 columns, or 32"):
        model(tokens, attention_mask=torch.ones(2, 5), past_key_values=past)
    with pytest.raises(ValueError, match="only one of them"):
        model(tokens, inputs_embeds=torch.zeros(2, 16, 32))


@torch.no_grad()
@pytest.mark.parametrize("given", [(2, 1), (1, 2), (1, 1)])
def test_positions_of_one_row_are_those_of_all(given):
    """Those of the first call, and of the next."""
    model, tokens, positions = seeded(tiny()).eval(), ids(), torch.arange(16)[None] + 3
    first, then = (part.expand(n, -1) for part, n in zip((positions[:, :10], positions[:, 10:]), given, strict=True))
    past = model(tokens[:, :10], position_ids=first, use_cache=True).past_key_values
    rest = model(tokens[:, 10:], position_ids=then, past_key_values=past).logits
    torch.testing.assert_close(rest, model(tokens, position_ids=positions).logits[:, 10:], rtol=1e-4, atol=1e-4)

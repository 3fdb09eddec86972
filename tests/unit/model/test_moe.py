"""Mixture of experts: the fast path equals the plain one, routing is the papers', losses and biases do what they say."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tests.models import ids, replace, seeded, shake, tiny
from txtrain.model import options
from txtrain.model.ffn import moe, traced
from txtrain.model.ffn.dense import GatedFFN
from txtrain.model.ffn.moe import (
    Experts,
    MixtureOfExperts,
    WithLoss,
    auxiliary_loss,
    by_loop,
    grouped_linear,
    grouped_mm,
)

mixture = partial(options.MoEConfig, type="moe")
SOFTMAX = mixture(gate="softmax", n_shared=0, bias_update_rate=0.0, aux_weight=0.1)


def built(config=None, **of_model):
    """One layer's feed-forward, away from its first values."""
    model = shake(seeded(tiny(ffn=config or mixture(), **of_model)))
    return model.blocks[0].ffn


# ------------------------------------------------------------------------------------------------------------ grouped product


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 0, 9], [0, 0, 0, 0], [2, 3, 2, 2]])
def test_grouped_product_equals_the_loop_forward_and_backward(dtype, counts):
    results = []
    for product in (by_loop, grouped_mm):
        g = torch.Generator().manual_seed(0)
        x = torch.randn(sum(counts), 16, generator=g).to(dtype).requires_grad_()
        weight = torch.randn(4, 24, 16, generator=g).to(dtype).requires_grad_()
        y = product(x, weight, torch.tensor(counts))
        up = torch.randn(y.shape, generator=g).to(dtype)
        results.append((y, *torch.autograd.grad(y, (x, weight), up)))
    for loop, grouped in zip(*results, strict=True):
        torch.testing.assert_close(grouped, loop, rtol=1e-5 if dtype is torch.float32 else 0.02, atol=1e-5 if dtype is torch.float32 else 0.02)


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm")
@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 0, 9], [0, 0, 0, 0]])
def test_traced_it_is_the_same_product_in_one_graph(counts):
    def product(x, weight, counts):
        return grouped_mm(x * 1, weight, counts) * 1

    results = []
    for of in (product, torch.compile(product, fullgraph=True, backend="aot_eager")):
        g = torch.Generator().manual_seed(0)
        x, weight = (torch.randn(shape, generator=g).requires_grad_() for shape in ((sum(counts), 16), (4, 24, 16)))
        y = of(x, weight, torch.tensor(counts))
        results.append((y, *torch.autograd.grad(y, (x, weight), torch.randn(y.shape, generator=g))))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    if sum(counts):
        assert torch.library.opcheck(traced.grouped_mm, (x, weight, torch.tensor(counts).cumsum(0, dtype=torch.int32)))


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm")
def test_the_kernel_is_taken_where_it_takes_the_rows(monkeypatch):
    taken = []
    monkeypatch.setattr(moe, "grouped_mm", lambda *args: taken.append(args[1].dtype) or by_loop(*args))
    counts = torch.tensor([2, 1])
    for size, dtype in ((16, torch.float32), (16, torch.bfloat16), (12, torch.float32), (12, torch.bfloat16), (13, torch.float32), (16, torch.float64)):
        grouped_linear(torch.randn(3, 16).to(dtype), torch.randn(2, size, 16).to(dtype), counts)
    assert taken == [torch.float32, torch.bfloat16, torch.float32], "rows of whole 16 bytes, in float32 or bfloat16"


def test_autocast_reaches_the_experts():
    ffn = built()
    with torch.autocast("cpu", torch.bfloat16):
        half = ffn.experts(torch.randn(6, 32), torch.tensor([1, 0, 2, 0, 3, 0, 0, 0]))
    assert half.dtype is torch.bfloat16


# ----------------------------------------------------------------------------------------------------------------- the layer


def token_by_token(ffn, x_BTD):
    """As one would write it on paper."""
    out = torch.zeros_like(x_BTD)
    for b, t in ((b, t) for b in range(x_BTD.shape[0]) for t in range(x_BTD.shape[1])):
        x = x_BTD[b, t]
        logits = ffn.router.weight @ x
        scores = logits.sigmoid() if ffn.gate == "sigmoid" else logits.softmax(0)
        ranks = scores if ffn._buffers["balance_bias"] is None else scores + ffn.balance_bias
        size = len(ranks) // ffn.n_groups
        groups = sorted(range(ffn.n_groups), key=lambda g: -ranks[g * size : (g + 1) * size].topk(min(2, size)).values.sum().item())[: ffn.top_k_groups]
        eligible = [e for g in groups for e in range(g * size, (g + 1) * size)]
        chosen = sorted(eligible, key=lambda e: -ranks[e].item())[: ffn.top_k]
        total = sum(scores[e] for e in chosen) if ffn.normalise else 1.0
        for e in chosen:
            experts = ffn.experts
            h = experts.act(experts.gate_proj[e] @ x) * (experts.up_proj[e] @ x)
            out[b, t] += scores[e] / total * ffn.routed_scale * (experts.down_proj[e] @ h)
        if ffn.shared is not None:
            out[b, t] += ffn.shared(x)
    return out


KINDS = {
    "deepseek": mixture(n_experts=8, top_k=3, n_groups=4, top_k_groups=2, routed_scale=2.5, n_shared=2),
    "mixtral": SOFTMAX,
    "switch": mixture(gate="softmax", top_k=1, normalise=False, n_shared=0, bias_update_rate=0.0, aux_weight=0.01),
    "groups of one": mixture(n_experts=4, n_groups=4, top_k_groups=3, top_k=2),
    "odd width": mixture(hidden_dim=13),
}


@pytest.mark.parametrize("kind", KINDS)
def test_equals_a_loop_over_tokens_with_gradients(kind):
    ffn = built(KINDS[kind])
    if ffn.bias_update_rate:
        ffn.balance_bias.copy_(torch.randn(len(ffn.balance_bias)) * 0.3)
    x = torch.randn(2, 6, 32, requires_grad=True)
    leaves = [x, *ffn.parameters()]
    results = [(y, *torch.autograd.grad(y.square().sum(), leaves)) for y in (token_by_token(ffn, x), ffn(x))]
    for by_hand, got in zip(*results, strict=True):
        torch.testing.assert_close(got, by_hand, rtol=1e-4, atol=1e-4)


def test_the_bias_moves_the_choice_and_not_the_weights():
    ffn = built(mixture(normalise=False))
    scores = torch.rand(5, 8)
    ffn.balance_bias.copy_(torch.tensor([0.0, 0, 9, 0, 0, 0, 0, 9]))
    chosen, weights = ffn.choose(scores)
    assert set(chosen.flatten().tolist()) == {2, 7}
    torch.testing.assert_close(weights, scores.gather(1, chosen))


def test_dense_layers_come_first_and_are_plain():
    config = tiny(n_layers=3, ffn=mixture(dense_layers=2, dense_hidden_dim=20))
    blocks = seeded(config).blocks
    assert [type(b.ffn) for b in blocks] == [GatedFFN, GatedFFN, MixtureOfExperts]
    assert blocks[0].ffn.up_proj.out_features == 20


@pytest.mark.parametrize("kind", KINDS)
def test_closed_forms_equal_the_built_layer(kind, monkeypatch):
    config = tiny(ffn=KINDS[kind], n_layers=1)
    model = seeded(config)
    ffn = model.blocks[0].ffn
    assert sum(p.numel() for p in ffn.parameters()) == config.ffn.n_params(config)
    idle = (config.ffn.n_experts - config.ffn.top_k) * 3 * config.dim * config.ffn.width(config)
    assert config.n_active_params == config.n_params - idle
    monkeypatch.setattr(moe, "_grouped_mm_takes", lambda weight: False)  # the counter does not know the kernel
    with FlopCounterMode(display=False) as counter:
        ffn(torch.randn(2, 5, 32))
    assert counter.get_total_flops() == 10 * config.ffn.flops(config, 5)


def test_a_width_left_open_gives_a_token_about_as_much_as_one_gated_ffn():
    config = tiny(dim=384, n_heads=4, ffn=mixture(top_k=3, n_shared=1))
    dense = options.GatedConfig(type="swiglu").n_params(config)
    assert config.ffn.n_active_params(config) == pytest.approx(dense, rel=0.02)


def test_each_expert_starts_as_a_matrix_of_its_own():
    model = seeded(tiny(dim=64, ffn=mixture(n_experts=4, hidden_dim=48), init=axes_init("xavier_uniform", scale_residual=True)))
    experts: Experts = model.blocks[0].ffn.experts
    bound = (6 / (64 + 48)) ** 0.5
    for weight, factor in ((experts.gate_proj, 1.0), (experts.down_proj, (2 * 2) ** -0.5)):
        for matrix in weight:
            assert matrix.abs().max().item() == pytest.approx(bound * factor, rel=0.02)
        assert not torch.equal(weight[0], weight[1])
    assert (model.blocks[0].ffn.balance_bias == 0).all()


def axes_init(distribution, **more):
    from txtrain.model.shape import InitConfig

    return InitConfig(distribution=distribution, **more)


def test_one_impossible_routing_is_one_problem():
    for wrong, word in (
        ({"top_k": 9}, "top_k"),
        ({"n_groups": 3}, "n_groups"),
        ({"n_groups": 2, "top_k_groups": 3}, "top_k_groups"),
        ({"n_groups": 4, "top_k": 3}, "top_k"),
        ({"top_k": 1}, "normalise"),
        ({"n_experts": 0}, "n_experts"),
        ({"aux_weight": -1.0}, "aux_weight"),
        ({"routed_scale": 0.0}, "routed_scale"),
    ):
        (problem,) = tiny(ffn=mixture(**wrong)).check()
        assert problem.startswith(f"`model.ffn.{word}` must ")


# ---------------------------------------------------------------------------------------------------------------- statistics


def test_counts_are_of_real_tokens_only():
    model = seeded(tiny(ffn=mixture(), n_layers=1))
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[0, 10:] = 0
    counts = model(ids(), attention_mask=mask).aux["blocks.0.expert_counts"]
    assert counts.sum() == 2 * mask.sum()
    assert not counts.requires_grad


def test_auxiliary_loss_is_one_where_even_and_the_number_of_experts_where_all_choose_one():
    even = torch.full((12, 4), 0.25)
    assert auxiliary_loss(even, torch.full((4,), 6.0), torch.ones(12)).item() == pytest.approx(1.0)
    one = F.one_hot(torch.zeros(12, dtype=torch.long), 4).float()
    assert auxiliary_loss(one, torch.tensor([12.0, 0, 0, 0]), torch.ones(12)).item() == pytest.approx(4.0)


def added_to_the_loss(model, tokens, weight):
    """Gradients of loss + weight * auxiliary losses, all of it by autograd through one scalar."""
    seen = []
    original = moe.auxiliary_loss

    def spy(*args):
        seen.append(original(*args))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moe, "auxiliary_loss", spy)
        patch.setattr(WithLoss, "apply", lambda y, loss, scale: y)
        loss = total(model(tokens, labels=tokens))
    return torch.autograd.grad(loss + weight * sum(seen), model.parameters())


def total(out):
    return out.loss + 0.3 * sum(out.mtp_losses or ())


@pytest.mark.parametrize("return_logits", [True, False])
@pytest.mark.parametrize("factor", [1.0, 3.0])
@pytest.mark.parametrize("mtp_depth", [0, 2])
def test_auxiliary_gradient_is_that_of_a_loss_that_is_added(return_logits, factor, mtp_depth):
    """factor: what multiplies the loss before its backward, such as the number of processes."""
    model = shake(seeded(tiny(ffn=SOFTMAX, mtp_depth=mtp_depth)))
    expected = added_to_the_loss(model, ids(), 0.1)
    loss = total(model(ids(), labels=ids(), return_logits=return_logits))
    for got, wanted in zip(torch.autograd.grad(factor * loss, model.parameters()), expected, strict=True):
        torch.testing.assert_close(got, factor * wanted, rtol=1e-4, atol=1e-5)


def test_auxiliary_gradients_of_micro_batches_are_a_mean_by_their_targets():
    """Equal micro-batches add up to the whole; what differs is only that each is evened out by itself."""
    model = shake(seeded(tiny(ffn=SOFTMAX)))
    tokens = ids(2, 16)
    twice = torch.cat((tokens, tokens))
    whole = torch.autograd.grad(model(twice, labels=twice).loss, model.parameters())
    n = twice[:, 1:].numel()
    halves = [torch.autograd.grad(model(tokens, labels=tokens, num_items_in_batch=n).loss, model.parameters()) for _ in range(2)]
    for a, *parts in zip(whole, *halves, strict=True):
        torch.testing.assert_close(sum(parts), a, rtol=1e-4, atol=1e-5)


def test_a_checkpointed_block_sends_the_same_gradients_and_counts_once():
    model = shake(seeded(tiny(ffn=SOFTMAX)))
    plain = torch.autograd.grad(model(ids(), labels=ids()).loss, model.parameters())
    for block in model.blocks:
        forward = block.forward
        block.forward = lambda x_BTD, context, forward=forward: checkpoint(forward, x_BTD, context, use_reentrant=False)
    out = model(ids(), labels=ids())
    again = torch.autograd.grad(out.loss, model.parameters())
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b)
    assert out.aux["blocks.0.expert_counts"].sum() == 2 * 32


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["deepseek", "mixtral"])
def test_a_compiled_block_sends_the_same_gradients(kind):
    """Without code generation: what is asked is whether the auxiliary loss finds its scale in a traced backward."""
    model = shake(seeded(tiny(ffn=replace(KINDS[kind], hidden_dim=16))))
    plain = torch.autograd.grad(3 * model(ids(), labels=ids()).loss, model.parameters())
    for block in model.blocks:
        block.compile(backend="aot_eager")
    out = model(ids(), labels=ids())
    for a, b in zip(plain, torch.autograd.grad(3 * out.loss, model.parameters()), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)
    assert out.aux["blocks.0.expert_counts"].sum() == 32 * KINDS[kind].top_k


def test_validation_has_no_auxiliary_loss():
    model = seeded(tiny(ffn=SOFTMAX))
    assert "blocks.0.aux_loss" in model(ids()).aux
    assert "blocks.0.aux_loss" not in model.eval()(ids()).aux


def test_bias_stays_float32_in_a_half_precision_model():
    model = seeded(tiny(ffn=mixture()))
    model.blocks[0].ffn.balance_bias.fill_(0.123456)
    model.to(torch.bfloat16)
    bias = model.blocks[0].ffn.balance_bias
    assert bias.dtype is torch.float32
    assert bias[0].item() == pytest.approx(0.123456, rel=1e-6)
    assert model(ids()).logits.dtype is torch.bfloat16
    assert "blocks.0.ffn.balance_bias" in model.state_dict()


def test_an_encoder_and_its_decoder_have_counts_of_their_own():
    config = tiny(topology="encoder_decoder", ffn=mixture(), decoder_start_token_id=0)
    aux = seeded(config)(ids(), labels=ids(2, 9)).aux
    assert set(aux) == {f"{stack}blocks.{i}.expert_counts" for stack in ("", "encoder.") for i in range(2)}


def test_padding_behind_a_target_is_no_visit():
    """Where the decoder reads the labels, and where it reads the source again; -100 within a target is a token."""
    labels = ids(2, 10)
    labels[0, 3:], labels[1, 7:], labels[1, 2] = -100, -100, -100
    written = torch.tensor([[1] * 3 + [0] * 7, [1] * 7 + [0] * 3])
    config = tiny(topology="encoder_decoder", ffn=mixture(), decoder_start_token_id=0)
    model = seeded(config)
    out = model(ids(), labels=labels)
    assert out.aux["blocks.0.expert_counts"].sum() == 2 * written.sum()
    assert out.aux["encoder.blocks.0.expert_counts"].sum() == 2 * 32
    given = {"decoder_input_ids": model.shifted_right(labels), "decoder_attention_mask": torch.ones_like(labels)}
    torch.testing.assert_close(out.logits[written.bool()], model(ids(), **given).logits[written.bool()], rtol=1e-4, atol=1e-5)
    head = options.ClassHeadConfig(type="class", n_classes=3, pooling="last")
    classes = seeded(replace(config, head=head, tie_word_embeddings=False))
    aux = classes(ids(2, 10), attention_mask=written, labels=torch.tensor([0, 1])).aux
    assert aux["blocks.0.expert_counts"].sum() == aux["encoder.blocks.0.expert_counts"].sum() == 2 * written.sum()


def test_a_swap_of_the_whole_ffn_keeps_the_rest():
    config = replace(tiny(), ffn=mixture())
    assert {k: v for k, v in tiny().n_params_by_part().items() if k != "ffn"} == {k: v for k, v in config.n_params_by_part().items() if k != "ffn"}

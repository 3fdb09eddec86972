"""Multi-token prediction: what each depth sees and predicts, its losses, and that decoding does without."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.models import ids, replace, seeded, shake, tiny
from txtrain.model import options
from txtrain.model.mtp import further_targets
from txtrain.objectives.causal_lm import CausalLM

DOCUMENTS = torch.tensor([[0] * 7 + [1] * 9, [0] * 3 + [1] * 2 + [2] * 11])


def model_of(depth, **changes):
    return shake(seeded(tiny(mtp_depth=depth, **changes)))


def test_targets_are_later_labels_of_the_same_document():
    labels = torch.tensor([[10, 11, 12, 13, 14]])
    assert further_targets(labels, None, 1).tolist() == [[12, 13, 14, -100]]
    assert further_targets(labels, None, 2).tolist() == [[13, 14, -100]]
    assert further_targets(labels, torch.tensor([[0, 0, 0, 1, 1]]), 1).tolist() == [[12, -100, -100, -100]]
    assert further_targets(labels[:, :2], None, 2).shape == (1, 0)
    assert further_targets(labels[:, :1], None, 2).shape == (1, 0)


@torch.no_grad()
@pytest.mark.parametrize("depth", [1, 3])
def test_depth_k_reads_k_tokens_ahead_and_no_further(depth):
    model = model_of(depth).eval()
    changed = ids().clone()
    changed[:, 9] = (changed[:, 9] + 7) % 61
    a, b = model(ids()), model(changed)
    for k, (x, y) in enumerate(zip(a.mtp_logits, b.mtp_logits, strict=True), start=1):
        assert x.shape == (2, 16 - k, 61)
        first = (x != y).any(-1).any(0).nonzero()[0].item()
        assert first == 9 - k


@torch.no_grad()
def test_a_module_is_projection_of_the_normed_pair_then_its_block():
    """By hand, in a model whose block is the identity but for its residual stream."""
    model = model_of(1, position=options.PositionConfig(type="none")).eval()
    module = model.mtp[0]
    module.block.forward = lambda x_BTD, context: x_BTD
    out = model(ids())
    h, e = out.last_hidden_state[:, :-1], model.embedding(ids())[:, 1:]
    x = F.linear(torch.cat((module.hidden_norm(h), module.token_norm(e)), -1), module.projection.weight)
    expected = model.head(module.final_norm(x), model.embedding.weight_VD)
    torch.testing.assert_close(out.mtp_logits[0], expected)


@torch.no_grad()
@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_packed_documents_predict_as_apart(norm_position):
    model = model_of(2, norm_position=norm_position).eval()
    packed = model(ids(), document_ids=DOCUMENTS[:1].expand(2, -1)).mtp_logits
    for start, end in ((0, 7), (7, 16)):
        apart = model(ids()[:, start:end]).mtp_logits
        for k, logits in enumerate(apart, start=1):
            torch.testing.assert_close(packed[k - 1][:, start : end - k], logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("depth", [1, 2])
def test_losses_equal_those_of_the_logits_with_and_without_chunks(depth):
    model = model_of(depth, logit_softcap=5.0)
    out = model(ids(), labels=ids(), document_ids=DOCUMENTS)
    chunked = model(ids(), labels=ids(), document_ids=DOCUMENTS, return_logits=False)
    assert chunked.mtp_logits is None
    for k in range(1, depth + 1):
        targets = further_targets(ids(), DOCUMENTS, k)
        expected = F.cross_entropy(out.mtp_logits[k - 1].flatten(0, 1), targets.flatten(), ignore_index=-100)
        assert out.mtp_losses[k - 1].item() == pytest.approx(expected.item(), rel=1e-5)
        assert chunked.mtp_losses[k - 1].item() == pytest.approx(expected.item(), rel=1e-5)


def test_every_parameter_is_trained_by_the_whole_and_none_of_a_module_by_the_next_token_alone():
    model = model_of(2)
    out = model(ids(), labels=ids(), return_logits=False)
    own = list(model.mtp.parameters())
    assert all(g is None for g in torch.autograd.grad(out.loss, own, allow_unused=True, retain_graph=True))
    (out.loss + sum(out.mtp_losses)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_the_next_token_is_predicted_as_without_modules():
    with_modules = model_of(2)
    without = seeded(replace(with_modules.config, mtp_depth=0))
    without.load_state_dict({name: p for name, p in with_modules.state_dict().items() if not name.startswith("mtp.")})
    assert torch.equal(with_modules(ids(), labels=ids()).loss, without(ids(), labels=ids()).loss)


@torch.no_grad()
def test_decoding_predicts_no_further_token():
    model = model_of(1).eval()
    out = model(ids(), use_cache=True)
    assert out.mtp_logits is None
    assert model(ids()[:, :1], past_key_values=out.past_key_values).mtp_logits is None
    assert model(ids(), logits_to_keep=1).mtp_logits is None
    assert len(model(ids()).to_tuple()) == 1, "transformers.Trainer takes what is in the tuple for predictions"


@pytest.mark.parametrize("mixture", [False, True])
def test_closed_forms_equal_the_built_model(mixture, monkeypatch):
    monkeypatch.setattr("txtrain.model.ffn.moe._grouped_mm_takes", lambda weight: False)
    monkeypatch.setattr("txtrain.model.stack.choose_kernel", lambda mask, **_: "plain")
    ffn = options.MoEConfig(type="moe", dense_layers=1) if mixture else options.GatedConfig(type="swiglu")
    for depth, norm_position in ((0, "pre"), (1, "post"), (3, "sandwich")):
        model = seeded(tiny(mtp_depth=depth, ffn=ffn, attention=options.MLAConfig(type="mla", q_rank=6), norm_position=norm_position))
        assert sum(p.numel() for p in model.mtp.parameters()) == model.config.n_params_by_part()["mtp"]
        assert sum(p.numel() for p in model.parameters()) == model.config.n_params
        with FlopCounterMode(display=False) as counter:
            model(ids())
        assert counter.get_total_flops() == model.config.forward_flops(2, 16)


def test_only_a_decoder_that_predicts_the_vocabulary_has_further_tokens():
    for changes, word in (
        ({"topology": "encoder"}, "mtp_depth"),
        ({"topology": "encoder_decoder"}, "mtp_depth"),
        ({"max_seq_len": 4}, "mtp_depth"),
        ({"mtp_depth": -1}, "mtp_depth"),
    ):
        assert any(f"`model.{word}` must be" in problem for problem in tiny(**{"mtp_depth": 4} | changes).check()), changes


# ------------------------------------------------------------------------------------------------------------- the objective


def batch_of(rows):
    return {"input_ids": ids(rows, 16), "labels": ids(rows, 16), "document_ids": DOCUMENTS.repeat(2, 1)[:rows]}


@pytest.mark.parametrize("depth", [1, 2])
def test_micro_batches_change_no_term(depth):
    """Depths have numbers of targets of their own; documents make them differ between rows."""
    model, objective = model_of(depth), CausalLM(mtp_depth=depth)
    batch = batch_of(4)
    denominators = objective.denominators(batch)
    whole = objective(model, batch, denominators)
    parts = [objective(model, {k: v[i : i + 1] for k, v in batch.items()}, denominators) for i in range(4)]
    assert len(set(map(int, denominators.values()))) == depth + 1
    for name, term in whole.items():
        assert sum(p[name] for p in parts).item() == pytest.approx(term.item(), rel=1e-5)


def test_the_weight_is_of_the_mean_over_depths_and_stays_out_of_the_loss_that_is_told():
    objective = CausalLM(mtp_weight=0.3, mtp_depth=2)
    terms = {"loss": torch.tensor(1.0), "mtp_loss": torch.tensor(2.0), "mtp_loss_2": torch.tensor(4.0)}
    assert objective.total(terms).item() == pytest.approx(1.0 + 0.3 * 3.0)
    assert objective.reported(terms).item() == 1.0
    assert objective.columns == ("mtp_loss", "mtp_loss_2", "val_mtp_loss", "val_mtp_loss_2")
    assert CausalLM().weights == {"loss": 1.0}


def test_rows_too_short_for_a_depth_have_no_targets_of_it():
    """A batch is as wide as its longest row, which may have fewer tokens than there are depths."""
    model, objective = model_of(3), CausalLM(mtp_depth=3)
    for length in (1, 2, 3):
        short = {"input_ids": ids(2, length), "labels": ids(2, length)}
        n = objective.denominators(short)
        terms = objective(model, short, {name: count.clamp(min=1) for name, count in n.items()})
        assert [terms[name].item() == 0 for name in n] == [int(count) == 0 for count in n.values()], length
        model.zero_grad()
        objective.total(terms).backward()
        # under FSDP all ranks use every module, or some would wait for others
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters()), length


def test_a_model_of_ones_own_is_not_asked_for_further_tokens():
    def own(input_ids, document_ids, labels, num_items_in_batch, return_logits):
        return type("Output", (), {"loss": torch.tensor(1.0), "mtp_losses": None})

    assert CausalLM()(own, batch_of(2), {"loss": torch.tensor(1)}) == {"loss": torch.tensor(1.0)}


make_mixture = partial(options.MoEConfig, type="moe")


@torch.no_grad()
def test_statistics_of_its_block_have_names_of_their_own():
    aux = model_of(2, ffn=make_mixture(dense_layers=1)).eval()(ids()).aux
    assert {name for name in aux if name.startswith("mtp")} == {"mtp.0.block.expert_counts", "mtp.1.block.expert_counts"}

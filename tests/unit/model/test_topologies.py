"""Encoders, encoder-decoders and images: the properties of test_properties.py where there is more than one causal stack."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models import ids, model_configs, moved, replace, seeded, shake, tiny
from txtrain.model import options
from txtrain.model.config import ModelConfig

DRAWS = settings(max_examples=25, deadline=None, derandomize=True)

encoders = st.builds(
    lambda config, head, norm, n_types: replace(
        config, topology="encoder", head=head, embedding=replace(config.embedding, norm=norm, n_types=n_types), logit_softcap=None
    ),
    model_configs,
    st.sampled_from([options.MLMHeadConfig(type="mlm"), options.MLMHeadConfig(type="mlm", next_sentence=False), options.LMHeadConfig(type="lm", bias=True)]),
    st.booleans(),
    st.sampled_from([0, 2]),
)
two_stacks = st.builds(
    lambda config, n, head, share: replace(config, topology="encoder_decoder", n_encoder_layers=n, head=head, share_embeddings=share),
    model_configs,
    st.sampled_from([None, 1, 2]),
    st.builds(options.LMHeadConfig, type=st.just("lm"), bias=st.booleans(), scale=st.booleans()),
    st.booleans(),
)
MLM = tiny(topology="encoder", head=options.MLMHeadConfig(type="mlm"), embedding=options.TokenEmbeddingConfig(type="token", norm=True, n_types=2))
IMAGES = tiny(
    topology="encoder",
    vocab_size=0,
    max_seq_len=17,
    position=options.LearnedConfig(type="learned"),
    embedding=options.PatchEmbeddingConfig(type="patch", image_size=8, patch_size=2, n_channels=3),
    head=options.ClassHeadConfig(type="class", n_classes=10),
    tie_word_embeddings=False,
)


def trains(model, loss):
    assert sum(p.numel() for p in model.parameters()) == model.config.n_params
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, f"{name} has no gradient"
        assert p.grad.isfinite().all(), f"{name}: gradient not finite"


@given(config=encoders)
@DRAWS
def test_every_encoder_trains_and_sees_both_sides(config: ModelConfig):
    model, tokens = shake(seeded(config)), ids()
    labels = tokens.masked_fill(torch.arange(16) % 3 != 0, -100)
    sentences = {"next_sentence_label": torch.tensor([0, 1])} if getattr(config.head, "next_sentence", False) else {}
    out = model(tokens, labels=labels, **sentences)
    types = {} if not config.embedding.n_types else {"token_type_ids": torch.arange(16)[None].expand(2, -1) // 8}
    trains(model, out.loss + model(tokens, labels=labels, **types).loss)
    chunked = model(tokens, labels=labels, return_logits=False).loss
    assert chunked.item() == pytest.approx(model(tokens, labels=labels).loss.item(), rel=1e-5)
    model.eval()
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 7) % config.vocab_size
    near = model(tokens).logits[:, -2], model(changed).logits[:, -2]
    sees_neighbour = all(config.attention.window_at(i) != 1 for i in range(config.n_layers))
    assert not sees_neighbour or not torch.equal(*near), "an encoder sees what comes after"


@given(config=encoders)
@DRAWS
def test_padding_and_packing_change_nothing_in_an_encoder(config: ModelConfig):
    model, tokens, cut = shake(seeded(config)).eval(), ids(), 7
    alone = model(tokens).logits
    mask = torch.cat((torch.ones_like(tokens), torch.zeros(2, 5, dtype=torch.long)), 1)
    padded = model(torch.cat((tokens, torch.full((2, 5), 3)), 1), attention_mask=mask).logits
    torch.testing.assert_close(padded[:, :16], alone, rtol=1e-4, atol=1e-4)
    documents = torch.tensor([0] * cut + [1] * (16 - cut)).expand_as(tokens)
    apart = torch.cat((model(tokens[:, :cut]).logits, model(tokens[:, cut:]).logits), 1)
    torch.testing.assert_close(model(tokens, document_ids=documents).logits, apart, rtol=1e-4, atol=1e-4)


@given(config=two_stacks)
@DRAWS
def test_every_pair_of_stacks_trains_without_a_leak(config: ModelConfig):
    model, source, target = shake(seeded(config)), ids(length=11), ids(seed=1)
    out = model(source, labels=target)
    trains(model, out.loss)
    assert model(source, labels=target, return_logits=False).loss.item() == pytest.approx(out.loss.item(), rel=1e-5)
    model.eval()
    changed = target.clone()
    changed[:, 9:] = (changed[:, 9:] + 7) % config.vocab_size
    a, b = model(source, decoder_input_ids=target).logits, model(source, decoder_input_ids=changed).logits
    assert moved(config, a[:, :9], b[:, :9]) == 0, "the decoder sees what comes after"
    other = model((source + 7) % config.vocab_size, decoder_input_ids=target).logits
    assert not torch.equal(a[:, 0], other[:, 0]), "the decoder does not see the source"


@given(config=two_stacks)
@DRAWS
def test_padding_packing_and_cache_change_nothing_between_two_stacks(config: ModelConfig):
    model, source, target = shake(seeded(config)).eval(), ids(length=11), ids(seed=1)
    alone = model(source, decoder_input_ids=target).logits
    mask = torch.cat((torch.ones_like(source), torch.zeros(2, 4, dtype=torch.long)), 1)
    padded = model(torch.cat((source, torch.full((2, 4), 3)), 1), attention_mask=mask, decoder_input_ids=target).logits
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-4)
    packed = model(
        source,
        document_ids=torch.tensor([0] * 5 + [1] * 6).expand_as(source),
        decoder_input_ids=target,
        decoder_document_ids=torch.tensor([0] * 9 + [1] * 7).expand_as(target),
    ).logits
    halves = (model(source[:, :5], decoder_input_ids=target[:, :9]).logits, model(source[:, 5:], decoder_input_ids=target[:, 9:]).logits)
    torch.testing.assert_close(packed, torch.cat(halves, 1), rtol=1e-4, atol=1e-4)
    past, pieces = None, []
    with torch.no_grad():
        for start, end in ((0, 4), (4, 5), (5, 9), *((i, i + 1) for i in range(9, 16))):
            given_source = {"input_ids": source} if past is None else {}
            out = model(**given_source, decoder_input_ids=target[:, start:end], past_key_values=past, use_cache=True)
            past = out.past_key_values
            pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), alone, rtol=1e-4, atol=1e-4)


def test_a_packed_target_begins_anew_with_each_document():
    """Otherwise the first word of a document would be predicted from the last one of another."""
    model, source, target = shake(seeded(tiny(topology="encoder_decoder", pad_token_id=0))).eval(), ids(length=11), ids(seed=1)
    documents = torch.tensor([0] * 5 + [1] * 6).expand_as(source), torch.tensor([0] * 9 + [1] * 7).expand_as(target)
    packed = model(source, document_ids=documents[0], labels=target, decoder_document_ids=documents[1]).logits
    halves = (model(source[:, :5], labels=target[:, :9]).logits, model(source[:, 5:], labels=target[:, 9:]).logits)
    torch.testing.assert_close(packed, torch.cat(halves, 1), rtol=1e-4, atol=1e-4)


def test_a_prefix_is_seen_from_before_and_the_rest_is_not():
    model, tokens = shake(seeded(tiny())).eval(), ids()
    prefix = (torch.arange(16) < 6).expand_as(tokens)
    plain = model(tokens, prefix_mask=prefix).logits
    inside, after = tokens.clone(), tokens.clone()
    inside[:, 5] = (inside[:, 5] + 7) % 61
    after[:, 9:] = (after[:, 9:] + 7) % 61
    assert not torch.equal(model(inside, prefix_mask=prefix).logits[:, 0], plain[:, 0])
    assert torch.equal(model(after, prefix_mask=prefix).logits[:, :9], plain[:, :9])
    with torch.no_grad():
        out = model(tokens[:, :6], prefix_mask=prefix[:, :6], use_cache=True)
        rest = model(tokens[:, 6:], past_key_values=out.past_key_values).logits
    torch.testing.assert_close(torch.cat((out.logits, rest), 1), plain, rtol=1e-4, atol=1e-4)


def test_only_masked_positions_go_through_a_masked_head():
    model, tokens = seeded(MLM), ids()
    seen = []
    model.head.dense.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[:-1].numel()))
    labels = tokens.masked_fill(torch.arange(16) % 8 != 0, -100)
    model(tokens, labels=labels, return_logits=False)
    assert seen == [4]


@pytest.mark.parametrize("pooling", ["first", "last", "mean"])
def test_pooling_looks_at_real_tokens_only(pooling):
    config = tiny(topology="encoder", head=options.ClassHeadConfig(type="class", n_classes=5, pooling=pooling))
    model, tokens = shake(seeded(config)).eval(), ids()
    mask = torch.cat((torch.ones_like(tokens), torch.zeros(2, 5, dtype=torch.long)), 1)
    padded = model(torch.cat((tokens, torch.full((2, 5), 3)), 1), attention_mask=mask).logits
    torch.testing.assert_close(padded, model(tokens).logits, rtol=1e-4, atol=1e-4)
    assert padded.shape == (2, 5)


@pytest.mark.parametrize("position", ["learned", "rope", "none", "alibi", "relative", "sinusoidal"])
@pytest.mark.parametrize("class_token", [True, False])
def test_images_train_with_every_position(position, class_token):
    kind = {
        "learned": options.LearnedConfig,
        "rope": options.RoPEConfig,
        "none": options.PositionConfig,
        "alibi": options.AlibiConfig,
        "relative": options.RelativeConfig,
        "sinusoidal": options.SinusoidalConfig,
    }[position](type=position)
    head = options.ClassHeadConfig(type="class", n_classes=10, pooling="first" if class_token else "mean")
    config = replace(IMAGES, position=kind, head=head, max_seq_len=16 + class_token, embedding=replace(IMAGES.embedding, class_token=class_token))
    assert not list(config.check())
    model = shake(seeded(config))
    trains(model, model(pixel_values=torch.randn(3, 3, 8, 8), labels=torch.tensor([1, 5, 9])).loss)


def test_patches_are_read_left_to_right_and_top_to_bottom():
    model = seeded(IMAGES)
    image = torch.randn(1, 3, 8, 8)
    x, grid = model.embedding(image)
    weight, bias = model.embedding.patch.weight.flatten(1), model.embedding.patch.bias
    assert grid == (4, 4)
    for row, column in ((0, 0), (0, 3), (2, 1)):
        patch = image[0, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten()
        torch.testing.assert_close(x[0, 1 + 4 * row + column], weight @ patch + bias, rtol=1e-4, atol=1e-5)


def test_another_resolution_reads_positions_interpolated():
    model = shake(seeded(IMAGES)).eval()
    table = model.position.interpolated((8, 8))[0]
    assert table.shape == (65, 32)
    assert torch.equal(table[0], model.position.embedding.weight[0])
    assert torch.equal(model.position.interpolated((4, 4))[0, :1], model.position.embedding.weight[:1])
    torch.testing.assert_close(model.position.interpolated((4, 4))[0], model.position.embedding.weight, rtol=1e-5, atol=1e-6)
    assert model(pixel_values=torch.randn(2, 3, 16, 8)).logits.shape == (2, 10)
    with pytest.raises(ValueError, match="multiple of 2 pixels"):
        model(pixel_values=torch.randn(1, 3, 9, 8))


@pytest.mark.parametrize(
    ("config", "inputs", "says"),
    [
        (tiny(), {"input_ids": ids(), "decoder_input_ids": ids()}, "one stack"),
        (tiny(), {"pixel_values": torch.zeros(1, 3, 8, 8)}, "reads tokens"),
        (IMAGES, {"input_ids": ids()}, "reads images"),
        (tiny(), {"input_ids": ids(), "token_type_ids": ids()}, "no segments"),
        (tiny(topology="encoder_decoder"), {"input_ids": ids()}, "`decoder_input_ids` or `labels`"),
    ],
)
def test_inputs_of_another_topology_are_refused(config, inputs, says):
    with pytest.raises(ValueError, match=says):
        seeded(config)(**inputs)


def test_t5s_queries_start_smaller_where_scores_are_not_scaled():
    from txtrain.model.shape import InitConfig

    init = InitConfig(distribution="fan_in", std=1.0, embedding_std=1.0, position_std=0.25, head_std=0.5)
    config = tiny(topology="encoder_decoder", dim=256, vocab_size=500, tie_word_embeddings=False, init=init, position=options.RelativeConfig(type="relative"))
    model = seeded(replace(config, attention=options.AttentionConfig(type="mha", scale=1.0)))
    std = {name: p.std().item() for name, p in model.named_parameters() if p.dim() > 1}
    for stack in ("", "encoder."):
        assert std[f"{stack}blocks.0.attention.q_proj.weight"] == pytest.approx((256 * 64) ** -0.5, rel=0.05)
        assert std[f"{stack}blocks.0.attention.k_proj.weight"] == pytest.approx(256**-0.5, rel=0.05)
        assert std[f"{stack}position.embedding.weight"] == pytest.approx(0.25, rel=0.2)
    assert std["blocks.0.cross_attention.q_proj.weight"] == pytest.approx((256 * 64) ** -0.5, rel=0.05)
    assert std["blocks.0.ffn.down_proj.weight"] == pytest.approx(model.config.ffn.width(config) ** -0.5, rel=0.05)
    assert std["embedding.token.weight"] == pytest.approx(1.0, rel=0.05)
    assert std["head.weight"] == pytest.approx(0.5, rel=0.05)


def test_only_a_model_with_sentence_pairs_asks_for_their_labels():
    """transformers.Trainer looks for parameters with "label" in their name, and evaluates only batches that have them all."""
    import inspect

    def labels(model):
        return [name for name in inspect.signature(type(model).forward).parameters if "label" in name]

    assert labels(seeded(tiny())) == ["labels"]
    assert labels(seeded(MLM)) == ["labels", "next_sentence_label"]

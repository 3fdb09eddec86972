"""Random small models of transformers, and the same model here: loaded from the folder that transformers wrote."""

import atexit
import inspect
import random
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from tests.cases import some
from tests.models import shake
from txtrain.hf.hf_class import HFClass
from txtrain.hf.load import load_pretrained
from txtrain.hf.name_map import stored_tensors
from txtrain.hf.registry import CLASSES, class_of
from txtrain.hf.tensor_layout import to_theirs
from txtrain.model.transformer import Transformer

DECODERS = ("gpt1", "gpt2", "llama2", "mistral", "gemma", "gemma2")
TWO_STACKS = ("t5", "t5_v1_1", "transformer")
FAMILIES = (*DECODERS, "bert", "bert_mlm", "vit", *TWO_STACKS)
SEEDS = range(5)
EACH_SEED = some(SEEDS, (0, 1))
T = 24  # longer than any window here, and than max_position_embeddings of the rotary families


class Pair(NamedTuple):
    theirs: Any
    ours: Transformer
    folder: Path

    @property
    def vocab_size(self) -> int:
        return self.ours.config.vocab_size

    @property
    def hf(self) -> HFClass:
        return class_of(self.ours.config)


def of_gpt(rng: random.Random) -> dict[str, Any]:
    heads = rng.choice([1, 2, 3, 4])
    dropout = rng.choice([0.0, 0.2])
    return {
        "vocab_size": rng.randrange(60, 90),
        "n_positions": rng.randrange(T, 40),
        "n_embd": heads * rng.choice([5, 8, 12]),
        "n_layer": rng.choice([1, 2, 3]),
        "n_head": heads,
        "layer_norm_epsilon": rng.choice([1e-5, 1e-3]),
        "initializer_range": rng.choice([0.02, 0.05]),
        "embd_pdrop": dropout,
        "resid_pdrop": dropout,
        "attn_pdrop": rng.choice([0.0, 0.1]),
        "tie_word_embeddings": rng.choice([True, False]),
        "eos_token_id": rng.randrange(60),
    }


def gpt1(rng: random.Random) -> Any:
    return transformers.OpenAIGPTConfig(**of_gpt(rng), afn=rng.choice(["gelu", "silu", "relu"]))


def gpt2(rng: random.Random) -> Any:
    return transformers.GPT2Config(
        **of_gpt(rng),
        n_inner=rng.choice([None, 37]),
        activation_function=rng.choice(["gelu_new", "gelu", "silu"]),
        scale_attn_weights=rng.choice([True, False]),
    )


def of_llama(rng: random.Random) -> dict[str, Any]:
    heads = rng.choice([2, 4, 6])
    return {
        "vocab_size": rng.randrange(60, 90),
        "hidden_size": heads * rng.choice([6, 8, 10]),
        "intermediate_size": rng.randrange(30, 70),
        "num_hidden_layers": rng.choice([2, 3]),
        "num_attention_heads": heads,
        "num_key_value_heads": rng.choice([n for n in (1, 2, heads) if heads % n == 0]),
        "head_dim": rng.choice([4, 8, 14]),
        "max_position_embeddings": 16,
        "rms_norm_eps": rng.choice([1e-6, 1e-4]),
        "initializer_range": rng.choice([0.02, 0.05]),
        "tie_word_embeddings": rng.choice([True, False]),
        "rope_theta": rng.choice([500.0, 10_000.0, 1_000_000.0]),
        "rope_scaling": rng.choice(
            [
                None,
                {"rope_type": "linear", "factor": 3.0},
                {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4},
                {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8, "beta_fast": 4.0, "beta_slow": 0.5, "attention_factor": 1.1},
                {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8, "low_freq_factor": 1.0, "high_freq_factor": 3.0},
            ]
        ),
        "attention_dropout": rng.choice([0.0, 0.1]),
        "bos_token_id": 1,
        "eos_token_id": rng.choice([2, [2, 5]]),
        "pad_token_id": rng.choice([None, 3]),
    }


def llama2(rng: random.Random) -> Any:
    act = rng.choice(["silu", "gelu", "gelu_pytorch_tanh"])
    return transformers.LlamaConfig(**of_llama(rng), hidden_act=act, attention_bias=rng.choice([True, False]), mlp_bias=rng.choice([True, False]))


def mistral(rng: random.Random) -> Any:
    return transformers.MistralConfig(**of_llama(rng), hidden_act=rng.choice(["silu", "relu"]), sliding_window=rng.choice([None, 1, 5, 9]))


def gemma(rng: random.Random) -> Any:
    act = rng.choice(["gelu_pytorch_tanh", "silu"])
    return transformers.GemmaConfig(**of_llama(rng), hidden_act=act, attention_bias=rng.choice([True, False]))


def gemma2(rng: random.Random) -> Any:
    shape = of_llama(rng)
    kinds = ["sliding_attention", "full_attention"]
    return transformers.Gemma2Config(
        **shape,
        hidden_activation=rng.choice(["gelu_pytorch_tanh", "silu"]),
        attention_bias=rng.choice([True, False]),
        sliding_window=rng.choice([4, 7]),
        layer_types=rng.choice([None, [rng.choice(kinds) for _ in range(shape["num_hidden_layers"])]]),
        query_pre_attn_scalar=rng.choice([5, 16, 144]),
        attn_logit_softcapping=rng.choice([None, 2.0, 30.0]),
        final_logit_softcapping=rng.choice([None, 3.0, 30.0]),
    )


def of_encoder(rng: random.Random) -> dict[str, Any]:
    heads = rng.choice([1, 2, 3])
    return {
        "hidden_size": heads * rng.choice([5, 8, 12]),
        "num_hidden_layers": rng.choice([1, 2, 3]),
        "num_attention_heads": heads,
        "intermediate_size": rng.randrange(30, 70),
        # No relu: where all of a narrow token's values are 0, the norm in BERT's head multiplies gradients by 1 / sqrt(eps), a million.
        "hidden_act": rng.choice(["gelu", "gelu_pytorch_tanh", "silu"]),
        "hidden_dropout_prob": rng.choice([0.0, 0.1]),
        "attention_probs_dropout_prob": rng.choice([0.0, 0.2]),
        "initializer_range": rng.choice([0.02, 0.05]),
        "layer_norm_eps": rng.choice([1e-12, 1e-3]),
    }


def bert(rng: random.Random) -> Any:
    return transformers.BertConfig(
        **of_encoder(rng),
        vocab_size=rng.randrange(60, 90),
        max_position_embeddings=rng.randrange(T, 40),
        type_vocab_size=rng.choice([2, 3]),
        pad_token_id=rng.choice([0, 3]),
        tie_word_embeddings=rng.random() < 0.7,
    )


bert_mlm = bert


def vit(rng: random.Random) -> Any:
    patch, n = rng.choice([2, 3]), rng.choice([2, 7])
    return transformers.ViTConfig(
        **of_encoder(rng),
        image_size=patch * rng.choice([3, 4]),
        patch_size=patch,
        num_channels=rng.choice([1, 3]),
        id2label={i: f"kind {i}" for i in range(n)},
        label2id={f"kind {i}": i for i in range(n)},
    )


def of_t5(rng: random.Random) -> dict[str, Any]:
    return {
        "vocab_size": rng.randrange(60, 90),
        "d_model": rng.choice([20, 32]),
        "d_kv": rng.choice([5, 8]),
        "d_ff": rng.randrange(30, 70),
        "num_layers": rng.choice([1, 2, 3]),
        "num_decoder_layers": rng.choice([1, 2, 3]),
        "n_positions": 24,
        "num_heads": rng.choice([1, 3, 4]),
        "relative_attention_num_buckets": rng.choice([6, 8, 32]),
        "relative_attention_max_distance": rng.choice([17, 40]),
        "dropout_rate": rng.choice([0.0, 0.1]),
        "layer_norm_epsilon": rng.choice([1e-6, 1e-3]),
        "initializer_factor": rng.choice([1.0, 0.5]),
        "decoder_start_token_id": rng.choice([0, 5]),
    }


def t5(rng: random.Random) -> Any:
    return transformers.T5Config(**of_t5(rng), feed_forward_proj=rng.choice(["relu", "silu", "gelu"]))


def t5_v1_1(rng: random.Random) -> Any:
    return transformers.T5Config(**of_t5(rng), feed_forward_proj=rng.choice(["gated-gelu", "gated-silu"]), tie_word_embeddings=False)


def transformer(rng: random.Random) -> Any:
    """MarianMTModel."""
    heads, vocab_size, width, tied = rng.choice([1, 2, 3]), rng.randrange(60, 90), rng.randrange(30, 70), rng.random() < 0.6
    return transformers.MarianConfig(
        vocab_size=vocab_size,
        d_model=heads * rng.choice([6, 8, 12]),
        encoder_layers=rng.choice([1, 2, 3]),
        decoder_layers=rng.choice([1, 2, 3]),
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=width,
        decoder_ffn_dim=width,
        max_position_embeddings=rng.randrange(T, 40),
        activation_function=rng.choice(["relu", "swish", "gelu"]),
        scale_embedding=rng.choice([True, False]),
        share_encoder_decoder_embeddings=tied and rng.random() < 0.7,  # version 5 gives both stacks tables of their own where it does not tie
        tie_word_embeddings=tied,
        dropout=rng.choice([0.0, 0.1]),
        attention_dropout=rng.choice([0.0, 0.1]),
        activation_dropout=rng.choice([0.0, 0.1]),
        init_std=rng.choice([0.02, 0.05]),
        eos_token_id=0,
        pad_token_id=vocab_size - 1,
        decoder_start_token_id=vocab_size - 1,
        static_position_embeddings=True,
    )


ARCHITECTURES = {c.family: c.architecture for c in reversed(CLASSES)} | {"bert_mlm": "BertForMaskedLM"}


def built(family: str, config: Any, seed: int) -> Any:
    """A model of transformers with no parameter, and no buffer that counts as one, at its neutral value."""
    theirs = getattr(transformers, ARCHITECTURES[family])(config)
    if family == "t5_v1_1" and theirs.lm_head.weight is theirs.shared.weight:
        # Version 5 builds every T5 with a tied head, and unties it where a folder holds another.
        theirs.lm_head.weight = torch.nn.Parameter(torch.randn_like(theirs.shared.weight))
    shake(theirs, seed)
    if family == "transformer":
        theirs.final_logits_bias.copy_(torch.randn(theirs.final_logits_bias.shape, generator=torch.Generator().manual_seed(seed)))
    if family.startswith("bert"):  # where the head is not tied, version 5 has two of these, of which it reads the second
        theirs.cls.predictions.bias.data.copy_(theirs.cls.predictions.decoder.bias.data)
    return theirs.eval()


@cache
def pair(family: str, seed: int) -> Pair:
    """In eval mode, with every parameter away from its neutral value. Shared by the tests: they leave it as it is."""
    torch.manual_seed(seed)
    config = globals()[family](random.Random(f"{family} {seed}"))
    config._attn_implementation = "eager"
    theirs = built(family, config, seed)
    folder = Path(tempfile.mkdtemp(prefix="txtrain-parity-"))
    atexit.register(shutil.rmtree, folder)
    theirs.save_pretrained(folder)
    return Pair(theirs, load_pretrained(folder), folder)


def tokens(p: Pair, batch: int = 3, length: int = T) -> torch.Tensor:
    return torch.randint(0, p.vocab_size, (batch, length), generator=torch.Generator().manual_seed(length))


def inputs(p: Pair, batch: int = 3, length: int = T) -> dict[str, torch.Tensor]:
    """What both models read, by name: whole rows without padding."""
    generator = torch.Generator().manual_seed(length)
    config = p.ours.config
    if p.ours.config.embedding.type == "patch":
        e = config.embedding
        return {"pixel_values": torch.randn(batch, e.n_channels, e.image_size, e.image_size, generator=generator)}
    made = {"input_ids": tokens(p, batch, length)}
    if config.topology == "encoder":
        made["token_type_ids"] = torch.randint(0, config.embedding.n_types, (batch, length), generator=generator)
    if config.topology == "encoder_decoder":
        made["decoder_input_ids"] = tokens(p, batch, length - 7)
    return made


def labelled(p: Pair, batch: int = 3, length: int = T) -> dict[str, torch.Tensor]:
    """The same with labels, some of them -100; a second stack reads the labels themselves."""
    made = inputs(p, batch, length)
    if "pixel_values" in made:
        return {**made, "labels": torch.arange(batch) % 2}
    labels = made.pop("decoder_input_ids", made["input_ids"]).clone()
    labels[0, : labels.shape[1] // 2] = -100
    labels[-1, -3:] = -100
    sentences = {"next_sentence_label": torch.arange(batch) % 2} if getattr(p.ours.config.head, "next_sentence", False) else {}
    return {**made, "labels": labels, **sentences}


def logits_of(out: Any) -> torch.Tensor:
    """Of one output of either, in one vector where a model has two heads."""
    if getattr(out, "seq_relationship_logits", None) is not None:
        return torch.cat((out.prediction_logits.flatten(), out.seq_relationship_logits.flatten()))
    if getattr(out, "nsp_logits", None) is not None:
        return torch.cat((out.logits.flatten(), out.nsp_logits.flatten()))
    return out.logits


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest absolute difference, as a share of the largest absolute value."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return ((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()).item()


def by_their_names(p: Pair, ours: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of our parameters' names and shapes, in their names and shapes."""
    shapes = {name: tuple(t.shape) for name, t in ours.items()}
    return {s.name: to_theirs(s, ours) for s in stored_tensors(p.hf.rows, p.ours.config, shapes)}


def their_cached(model: Any, tokens: torch.Tensor, n_prompt: int, **source: Any) -> torch.Tensor:
    """Logits of a prompt at once and of the rest token by token. source: what every call gets, of a model that has an encoder."""
    cache = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    ids = "decoder_input_ids" if source else "input_ids"
    out = model(**{ids: tokens[:, :n_prompt]}, use_cache=True, **source)
    found = [out.logits]
    for t in range(n_prompt, tokens.shape[1]):
        out = model(**{ids: tokens[:, t : t + 1], cache: getattr(out, cache)}, use_cache=True, **source)
        found.append(out.logits)
    return torch.cat(found, dim=1)


def our_cached(model: Transformer, tokens: torch.Tensor, n_prompt: int, **source: Any) -> torch.Tensor:
    """The same; the source is read by the first call only."""
    ids = "decoder_input_ids" if source else "input_ids"
    out = model(**{ids: tokens[:, :n_prompt]}, use_cache=True, **source)
    found = [out.logits]
    for t in range(n_prompt, tokens.shape[1]):
        out = model(**{ids: tokens[:, t : t + 1]}, use_cache=True, past_key_values=out.past_key_values)
        found.append(out.logits)
    return torch.cat(found, dim=1)

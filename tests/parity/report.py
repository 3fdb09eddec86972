"""docs/parity.md: a section for each version of transformers that the tests were run with."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import transformers

INTRODUCTION = """# Parity with Hugging Face transformers

Written by the test run (`TXTRAIN_WRITE_DOCS=1 pytest -n0 -m "slow or not slow" tests/parity`), once for each version of `transformers`.

Each cell is the largest difference seen between the class of `transformers` and the same model loaded by `txtrain.load_pretrained` from
the folder that `transformers` wrote: largest absolute difference / largest absolute value, float32 on the CPU. 1e-5 is allowed.

The models are small and of random shape, no parameter at its neutral value: heads, key-value heads, head size, width, depth, vocabulary,
tied or not, biases, windows shorter than the sequence, rotary base and scaling, soft caps, activations, layers of either stack, patches,
classes. bert is `BertForPreTraining`, bert_mlm `BertForMaskedLM`, transformer `MarianMTModel`.

| row | what is compared |
|---|---|
| logits | one pass over sequences longer than the window and, for rotary positions, than `max_position_embeddings` |
| loss | with `labels`, some of them -100; bert: of masked words and of sentences; vit: of classes; two stacks read the labels shifted |
| gradients | of that loss, for every parameter, each by its own largest value |
| cached decoding | a prompt at once, then token by token, a source once (GPT-1 has no cache in `transformers`: against its full pass) |
| rotary scaling | logits, gradients, cached decoding and the export of every `rope_type` in both spellings, in float64; 1e-6 is allowed |
| left, right padding | logits of the real tokens, positions counted over the padding as `transformers` does, and from the mask |
| another resolution | images with more patches than the table of positions has, and not square |
| inputs_embeds | vectors in place of tokens; before version 5, Gemma's classes scaled them too, here they enter as they are |
| round trip | every tensor and every field of the configuration, `transformers` -> here -> `transformers` |
| losses of the Trainer | ten steps of `transformers.Trainer` without dropout, the same batches through both models |
| bf16 logits | not a difference but a ratio: ours to the nearest of their runs / theirs among each other (eager, SDPA, autocast); 1 is allowed |

An empty cell is something that the class does not do (BERT and ViT decode nothing, images have no padding), or that this page was not yet
written with under that version.

With gradient accumulation the Trainer tells a model how many targets a batch has. The loss of our models is divided by it whatever the family, so that
accumulation changes nothing; that of BERT's, T5's and Marian's classes in `transformers` is not, and they are compared without. Marian's bias
on the logits is a buffer there and never trained; here it is a parameter, frozen for the comparison.

A key's bias in attention without rotary positions has a gradient of nothing but rounding: it is compared with the largest gradient.

What is refused, by the name of the field in config.json: rotary types other than default, linear, dynamic, yarn and llama3; partial rotary factors;
bidirectional attention of a decoder, a decoder of BERT's; cross-attention in one stack; relative positions in BERT
(`position_embedding_type`); `qkv_bias: false`; stacks that differ in heads, width or vocabulary; an unknown `feed_forward_proj`;
`scale_attn_by_inverse_layer_idx`, `reorder_and_upcast_attn`; quantisation; code of the model's own (`auto_map`); and any field that is
neither known nor known to be harmless.

Of two spellings both are read, and what every version reads is written: `rope_parameters`, or `rope_theta` with `rope_scaling`; ViT's
modules of version 5; BERT's gamma and beta. What the tensors say counts: a folder with the head for sentences is `BertForPreTraining`
whatever it calls itself, and T5's head is tied unless the folder holds another. A tensor that is there twice (a tied head, an embedding
of each stack) must be the same twice, and Marian's tables the sines and cosines of their positions. Version 4 of `transformers` has one
field for T5's tying and its output scale: a T5 that is tied and not scaled, or scaled and not tied, is for version 5.

Dynamic NTK takes the length of each forward; a class of `transformers` keeps the frequencies of the longest one until it reads one shorter than
`max_position_embeddings`. YaRN's attention factor follows `factor`, as in version 5; 4.57 takes `max_position_embeddings /
original_max_position_embeddings` in its place, which is the same wherever the two agree.

The Transformer of 2017 has its sines in the even dimensions, Marian in the first half: `model.position.layout=halves` before training
makes one that is saved as `MarianMTModel`, with `model.head.bias` or without. The other is compared with `torch.nn.Transformer`.
"""


def write(path: Path, table: Mapping[str, Mapping[str, float]], families: Sequence[str]) -> None:
    version = f"## transformers {transformers.__version__}"
    old = path.read_text() if path.exists() else ""
    sections = {s.splitlines()[0]: s for s in re.split(r"(?m)^(?=## transformers )", old)[1:]}
    rows = [f"| {check} | " + " | ".join(f"{seen[f]:.1e}" if f in seen else "" for f in families) + " |" for check, seen in table.items()]
    head = f"| | {' | '.join(families)} |\n|---|{'---|' * len(families)}"
    sections[version] = f"{version}\n\ntorch {torch.__version__}\n\n{head}\n" + "\n".join(rows) + "\n"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join([INTRODUCTION, *(sections[name].strip() + "\n" for name in sorted(sections, reverse=True))]))

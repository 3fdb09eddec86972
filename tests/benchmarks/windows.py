"""Training steps with a sliding window at growing lengths, beside transformers: the same weights and tokens, one process, sides in turns.

    python -m tests.benchmarks.windows [FAMILY ...] [--lengths 256 2048 8192] [--rounds 3] [--threads 1] [--ours]

2 layers, dim 384, 6 heads (2 for keys and values), a vocabulary of 8192, window 128; 2048 tokens a step, or one sequence where it is longer.
CPU seconds of forward and backward, the least of the rounds: other work on the machine does not count. Ratios above 1: txtrain is faster.
"""

import argparse
import tempfile
import time
from typing import Any

import torch
import transformers

from txtrain.hf.load import load_pretrained

TOKENS, VOCAB = 2048, 8192


def their_model(family: str, length: int) -> Any:
    shape = {"hidden_size": 384, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": VOCAB}
    shape |= {"intermediate_size": 1024, "max_position_embeddings": length, "pad_token_id": None, "eos_token_id": None, "sliding_window": 128}
    if family == "mistral":
        return transformers.MistralForCausalLM(transformers.MistralConfig(**shape))
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**shape, query_pre_attn_scalar=64))


def seconds(model: Any, ids: torch.Tensor) -> float:
    begin = time.process_time()
    model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad()
    return time.process_time() - begin


def compare(family: str, length: int, rounds: int, ours_alone: bool) -> str:
    torch.manual_seed(0)
    theirs = their_model(family, length)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        sides = [load_pretrained(folder).train()] + ([] if ours_alone else [theirs.train()])
    ids = torch.randint(0, VOCAB, (max(1, TOKENS // length), length))
    times = [[seconds(side, ids) for side in sides] for _ in range(rounds + 1)][1:]  # the first warms up
    best = [min(column) for column in zip(*times, strict=True)]
    per_token = best[0] / ids.numel() * 1e3
    return f"{family:8} {length:6} ours {best[0]:7.2f} s  {per_token:6.3f} ms a token" + ("" if ours_alone else f"  theirs {best[1]:7.2f} s  ratio {best[1] / best[0]:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("families", nargs="*", default=["mistral", "gemma2"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 1024, 2048, 4096, 8192])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ours", action="store_true", help="without transformers")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for name in given.families:
        for n in given.lengths:
            print(compare(name, n, given.rounds, given.ours), flush=True)

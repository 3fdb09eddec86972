"""Training steps and greedy decoding side by side with transformers: one process, the same weights, batch and optimizer, interleaved.

    python -m tests.benchmarks.against_transformers [FAMILY ...] [--rounds 5] [--layers 6] [--threads 2]

Each family has 6 layers, dim 384, 6 heads (2 for keys and values where the class has them apart), a vocabulary of 8192; a step is
forward, backward and AdamW on 8 x 256 tokens. Sides take turns and the best of the rounds counts: whatever else runs on the machine
hits both. Ratios above 1: txtrain is faster.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

from txtrain.hf.load import load_pretrained
from txtrain.model.generation import generate

DIM, HEADS, KV_HEADS, VOCAB, BATCH, LENGTH = 384, 6, 2, 8192, 8, 256
PROMPT, NEW = 32, 128


def their_model(family: str, layers: int) -> Any:
    gpt = {"n_embd": DIM, "n_layer": layers, "n_head": HEADS, "vocab_size": VOCAB, "n_positions": 1024}
    gpt |= dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), 0.0) | {"eos_token_id": None, "bos_token_id": None}
    llama = {"hidden_size": DIM, "num_hidden_layers": layers, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": DIM // HEADS}
    llama |= {"vocab_size": VOCAB, "intermediate_size": 1024, "max_position_embeddings": 1024, "pad_token_id": None, "eos_token_id": None}
    made: dict[str, Callable[[], Any]] = {
        "gpt1": lambda: transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(**gpt)),
        "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**gpt)),
        "llama2": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama)),
        "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**llama, sliding_window=128)),
        "gemma": lambda: transformers.GemmaForCausalLM(transformers.GemmaConfig(**llama)),
        "gemma2": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**llama, sliding_window=128, query_pre_attn_scalar=64)),
    }
    return made[family]()


def step_of(model: torch.nn.Module, ids: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def best(rounds: int, *sides: Callable[[], Any]) -> list[float]:
    """Seconds of each side's best round; the sides take turns. The first round warms up."""
    times: list[list[float]] = [[] for _ in sides]
    for _ in range(rounds + 1):
        for side, seen in zip(sides, times, strict=True):
            begin = time.perf_counter()
            side()
            seen.append(time.perf_counter() - begin)
    return [min(seen[1:]) for seen in times]


def decoders(theirs: Any, ours: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
    prompt = torch.arange(PROMPT)[None] + 5
    mask = torch.ones_like(prompt)
    return (
        lambda: theirs.eval().generate(prompt, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0),
        lambda: generate(ours.eval(), prompt, max_new_tokens=NEW, eos_token_id=None),
    )


def compare(family: str, layers: int, rounds: int) -> str:
    torch.manual_seed(0)
    theirs = their_model(family, layers)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = load_pretrained(folder)
    ids = torch.randint(0, VOCAB, (BATCH, LENGTH))
    their_decoding, our_decoding = decoders(theirs, ours)
    their_token, our_token = (seconds / NEW for seconds in best(rounds, their_decoding, our_decoding))
    their_step, our_step = best(rounds, step_of(theirs.train(), ids), step_of(ours.train(), ids))
    return (
        f"{family:8} step {their_step * 1e3:7.0f} ms, here {our_step * 1e3:7.0f} ms: {their_step / our_step:.2f} x"
        f"    token {their_token * 1e3:6.2f} ms, here {our_token * 1e3:6.2f} ms: {their_token / our_token:.2f} x"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("families", nargs="*", default=["gpt1", "gpt2", "llama2", "mistral", "gemma", "gemma2"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    transformers.logging.set_verbosity_error()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, {given.threads} threads, best of {given.rounds}")
    for family in given.families:
        print(compare(family, given.layers, given.rounds), flush=True)


if __name__ == "__main__":
    main()

"""A training step beside litgpt (llama2) and nanoGPT (gpt2): the same shape, tokens and optimizer, in one process, in turns.

    python -m tests.benchmarks.peers [--layers 6] [--rounds 3] [--nanogpt FOLDER]

litgpt: `pip install litgpt`; FOLDER: a clone of https://github.com/karpathy/nanoGPT. A peer that is not there is said and left out. How it is
measured: sides.py.
"""

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.sides import BATCH, DIM, HEADS, HIDDEN, KV_HEADS, LENGTH, VOCAB, best, step_of
from tests.benchmarks.variants import model_of

NANOGPT = Path("/tmp/nanoGPT")


def litgpt_step(layers: int) -> Callable[[], None]:
    """Raises ImportError without litgpt."""
    from litgpt import GPT, Config
    from litgpt.utils import chunked_cross_entropy

    how = {"n_head": HEADS, "n_query_groups": KV_HEADS, "head_size": DIM // HEADS, "n_embd": DIM, "intermediate_size": HIDDEN, "n_layer": layers}
    how |= {"block_size": 1024, "vocab_size": VOCAB, "padded_vocab_size": VOCAB, "rotary_percentage": 1.0, "parallel_residual": False, "bias": False}
    model = GPT(Config(**how, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP"))
    model.apply(model._init_weights)
    model.max_seq_length = LENGTH  # as its pretraining sets it
    return _step(model, lambda ids, targets: chunked_cross_entropy(model(ids), targets, chunk_size=0))


def nanogpt_step(layers: int, folder: Path) -> Callable[[], None]:
    """Raises OSError without a clone in the folder."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    how = module.GPTConfig(block_size=1024, vocab_size=VOCAB, n_layer=layers, n_head=HEADS, n_embd=DIM, dropout=0.0, bias=True)
    model = module.GPT(how)
    return _step(model, lambda ids, targets: model(ids, targets)[1])


def _step(model: Any, loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4, fused=True)
    ids = torch.randint(5, VOCAB, (BATCH, LENGTH + 1))

    def step() -> None:
        loss_of(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def peer_times(family: str, layers: int, rounds: int, folder: Path = NANOGPT) -> list[float]:
    """CPU seconds of a step, ours and the peer's."""
    theirs = litgpt_step(layers) if family == "llama2" else nanogpt_step(layers, folder)
    gated = ["model/attention=gqa", f"model.attention.n_kv_heads={KV_HEADS}", f"model.ffn.hidden_dim={HIDDEN}"] if family == "llama2" else []
    model = model_of(f"model={family}", f"model.n_layers={layers}", "model.max_seq_len=1024", *gated)
    ids = torch.randint(5, VOCAB, (BATCH, LENGTH))
    return best(rounds, step_of(model, {"input_ids": ids, "labels": ids}), theirs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--nanogpt", type=Path, default=NANOGPT)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for family, peer in (("llama2", "litgpt"), ("gpt2", "nanoGPT")):
        try:
            ours, theirs = peer_times(family, given.layers, given.rounds, given.nanogpt)
        except (ImportError, OSError) as e:
            print(f"{peer} is not here: {e}", flush=True)
            continue
        print(f"{family:8} ours {ours * 1e3:7.0f} ms   {peer} {theirs * 1e3:7.0f} ms   {theirs / ours:.2f} x", flush=True)


if __name__ == "__main__":
    main()

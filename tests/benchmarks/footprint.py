"""Memory: of a step beside transformers, of full checkpointing beside `plan`, and of the cache beside its closed form.

    python -m tests.benchmarks.footprint [step] [checkpointing] [cache] [accumulation] [--layers 6] [--families ...]

step            the fullest moment of forward, backward and AdamW on 8 x 256 tokens, theirs and ours: parameters, moments and all that torch's
                dispatcher sees beside them
checkpointing   the same of one model whose blocks are all recomputed, beside what `plan` counts for it
cache           bytes of the cache's tensors after 500 tokens over `plan`'s count, and at how many of the last 400 tokens one of them was copied
accumulation    counted for Llama 2 70B on 64 processes under fsdp: gradients reduced in each micro-batch over whole ones between them
"""

import argparse
import gc
from typing import Any

import torch

import txtrain
from tests.benchmarks.sides import BATCH, FAMILIES, LENGTH, VOCAB, batch_of, pair, step_of
from tests.benchmarks.variants import SHAPE
from tests.unit.planning.zero_memory import Watched
from txtrain.parallel.activation_checkpointing import wrap_blocks
from txtrain.planning.memory.count import memory


def step_peak(model: Any, batch: dict[str, torch.Tensor]) -> int:
    """Bytes of the fullest moment of a step, parameters and optimizer among them."""
    step = step_of(model, batch)
    step()  # makes the moments
    gc.collect()
    with Watched() as watched:
        step()
    return 3 * sum(p.nbytes for p in model.parameters()) + watched.peak - watched.held


def step_peaks(family: str, layers: int) -> tuple[int, int]:
    """Ours and theirs."""
    theirs, ours = pair(family, layers)
    batch = batch_of(family)
    return step_peak(ours, batch), step_peak(theirs, batch)


def checkpointed(family: str, layers: int) -> tuple[int, int]:
    """Seen and counted."""
    batch = f"data.seq_len={LENGTH}", f"data.global_batch_size={BATCH}", f"data.micro_batch_size={BATCH}"
    how = f"model={family}", f"model.n_layers={layers}", "trainer.accelerator=cpu", "trainer.activation_checkpointing=full"
    config: Any = txtrain.compose([*SHAPE, *how, *batch])
    model = txtrain.build_model(config.model)
    wrap_blocks(model, "full", False)
    return step_peak(model, batch_of(family)), int(memory(config, 1).peak)


def cache_of(family: str, tokens: int = 500, read: int = 100) -> tuple[int, int, int]:
    """Bytes of its tensors, bytes in closed form, and at how many tokens of those written a tensor was copied."""
    model = pair(family, 2)[1].eval()
    ids, past, copied = torch.randint(5, VOCAB, (1, tokens)), None, 0
    with torch.inference_mode():
        for at in range(read, tokens + 1):
            begin = 0 if past is None else at - 1
            before = [] if past is None else [(b.data_ptr(), layer.end) for layer in past.layers for b in layer.buffers]
            past = model(input_ids=ids[:, begin:at], past_key_values=past, use_cache=True, logits_to_keep=1).past_key_values
            after = [(b.data_ptr(), layer.end) for layer in past.layers for b in layer.buffers]
            copied += any(a[0] != b[0] or b[1] != a[1] + 1 for a, b in zip(before, after, strict=False))
    held = sum(b.nbytes for layer in past.layers for b in layer.buffers)
    return held, model.config.cache_bytes(tokens, bytes_per_value=4), copied


def accumulated() -> tuple[int, int]:
    """Reduced in each micro-batch, and not."""
    how = "model=llama2_70b", "strategy=fsdp", "data.micro_batch_size=1", "data.global_batch_size=1024", "trainer.activation_checkpointing=full", "trainer.precision=bf16-mixed"
    each, whole = (int(memory(txtrain.compose([*how, f"strategy.reduce_each_micro_batch={on}"]), 64).peak) for on in ("true", "false"))
    return each, whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", nargs="*", default=["step", "checkpointing", "cache", "accumulation"])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES))
    given = parser.parse_args()
    for family in given.families if "step" in given.what else ():
        ours, theirs = step_peaks(family, given.layers)
        print(f"{family:12} step           ours {ours / 1e6:6.0f} MB   theirs {theirs / 1e6:6.0f} MB   {ours / theirs:.2f} of it", flush=True)
    for family in ("gpt2", "llama2", "mistral", "gemma2", "deepseek_r1") if "checkpointing" in given.what else ():
        seen, counted = checkpointed(family, given.layers)
        print(f"{family:12} checkpointing  seen {seen / 1e6:6.0f} MB   counted {counted / 1e6:5.0f} MB   {seen / counted:.2f} of it", flush=True)
    for family in ("llama2", "mistral", "deepseek_r1") if "cache" in given.what else ():
        held, form, copied = cache_of(family)
        print(f"{family:12} cache          held {held:9,} bytes  closed form {form:9,}   {held / form:.2f} of it, copied at {copied} of 400 tokens", flush=True)
    if "accumulation" in given.what:
        each, whole = accumulated()
        print(f"llama2_70b, 64 processes, accumulating: reduced each time {each / 1e9:.0f} GB, whole {whole / 1e9:.0f} GB", flush=True)


if __name__ == "__main__":
    main()

"""Two sides of one measurement: the same model here and in transformers, on the same weights and batch, in one process, in turns.

CPU seconds of one thread, the least of some rounds: other work on the machine slows both sides, and does not count. Ratios above 1: txtrain is faster.
"""

import math
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from txtrain.hf.load import load_pretrained

DIM, HEADS, KV_HEADS, HIDDEN, VOCAB, BATCH, LENGTH = 384, 6, 2, 1024, 8192, 8, 256
FAMILIES = ("transformer", "gpt1", "bert", "gpt2", "t5", "vit", "llama2", "mistral", "gemma", "gemma2", "deepseek_r1")
DECODERS = ("llama2", "gpt2", "mistral", "gemma2", "t5", "deepseek_r1")

_NO_DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout", "activation_dropout", "dropout_rate", "classifier_dropout")


def _config(family: str, layers: int, length: int) -> Any:
    heads = {"num_attention_heads": HEADS}
    stack = {"hidden_size": DIM, "num_hidden_layers": layers, **heads}
    gpt = {"n_embd": DIM, "n_layer": layers, "n_head": HEADS, "vocab_size": VOCAB, "n_positions": 1024, "eos_token_id": None, "bos_token_id": None}
    gpt |= dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), 0.0)
    llama = {**stack, "num_key_value_heads": KV_HEADS, "head_dim": DIM // HEADS, "vocab_size": VOCAB, "intermediate_size": HIDDEN}
    llama |= {"max_position_embeddings": max(1024, length), "pad_token_id": None, "eos_token_id": None}
    encoder = {**stack, "intermediate_size": 4 * DIM, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    marian = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", layers), ("attention_heads", HEADS), ("ffn_dim", 4 * DIM))}
    experts = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": HIDDEN // 2, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
    latent = {"q_lora_rank": 192, "kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64}
    made: dict[str, Callable[[], Any]] = {
        "transformer": lambda: transformers.MarianConfig(
            d_model=DIM, vocab_size=VOCAB, max_position_embeddings=1024, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
            pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, forced_eos_token_id=None, scale_embedding=True, activation_function="relu", **marian,
        ),
        "gpt1": lambda: transformers.OpenAIGPTConfig(**gpt),
        "gpt2": lambda: transformers.GPT2Config(**gpt),
        "bert": lambda: transformers.BertConfig(**encoder, vocab_size=VOCAB),
        "t5": lambda: transformers.T5Config(
            d_model=DIM, d_kv=DIM // HEADS, d_ff=4 * DIM, num_layers=layers, num_heads=HEADS, vocab_size=VOCAB, dropout_rate=0.0, decoder_start_token_id=0, eos_token_id=None
        ),
        "vit": lambda: transformers.ViTConfig(**encoder, image_size=128, patch_size=8, num_labels=1000),
        "llama2": lambda: transformers.LlamaConfig(**llama),
        "mistral": lambda: transformers.MistralConfig(**llama, sliding_window=128),
        "gemma": lambda: transformers.GemmaConfig(**llama),
        "gemma2": lambda: transformers.Gemma2Config(**llama, sliding_window=128, query_pre_attn_scalar=64),
        "deepseek_r1": lambda: transformers.DeepseekV3Config(
            **{**llama, "num_key_value_heads": HEADS, "head_dim": 32, "max_position_embeddings": 1024}, **experts, **latent, rope_scaling=None
        ),
    }
    return made[family]()


_CLASSES = {
    "transformer": "MarianMTModel", "gpt1": "OpenAIGPTLMHeadModel", "gpt2": "GPT2LMHeadModel", "bert": "BertForMaskedLM", "t5": "T5ForConditionalGeneration",
    "vit": "ViTForImageClassification", "llama2": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM", "deepseek_r1": "DeepseekV3ForCausalLM",
}  # fmt: skip


def pair(family: str, layers: int, length: int = LENGTH) -> tuple[Any, Any]:
    """Theirs, and ours loaded from what it saves."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    theirs = getattr(transformers, _CLASSES[family])(_config(family, layers, length))
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return theirs, load_pretrained(folder)


def batch_of(family: str, rows: int = BATCH, length: int = LENGTH) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, VOCAB, (rows, length))
    if family == "vit":
        return {"pixel_values": torch.randn(rows, 3, 128, 128), "labels": torch.randint(0, 1000, (rows,))}
    if family == "bert":  # a seventh of the words is to be found
        return {"input_ids": ids, "labels": ids.masked_fill(torch.rand(ids.shape) > 0.15, -100)}
    return {"input_ids": ids, "labels": ids}


def loss_of(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """As each is trained by its own loop: here the loss is made by chunks of tokens, and logits are not returned."""
    ours = {} if isinstance(model, transformers.PreTrainedModel) else {"return_logits": False}
    found: torch.Tensor = model(**batch, **ours).loss
    return found


def step_of(model: Any, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4, fused=True)

    def step() -> None:
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def added_product(_: Any, a: Any, b: Any, **__: Any) -> int:
    """FLOPs of `addmm_` and the like, of the shapes of their arguments."""
    return 2 * math.prod(a) * int(b[-1])


def causal_half(count: Callable[..., int], at: int) -> Callable[..., int]:
    """FLOPs of the CPU's attention kernel. at: of q in its arguments, which is followed by k and v."""

    def counted(*shapes: Any, is_causal: bool = False, **_: Any) -> int:
        causal = is_causal or any(x is True for x in shapes)
        return count(*shapes[: at + 3]) // (2 if causal else 1)

    return counted


def flops_of(work: Callable[[], Any]) -> int:
    """FLOPs of its matrix products and attention, a causal half counted as a half."""
    kernels = torch.ops.aten
    custom = {  # what torch's counter does not know
        kernels.addmm_: added_product,
        kernels.baddbmm_: added_product,
        kernels._grouped_mm: lambda a, b, *_, **__: added_product(None, a, b),
        kernels._scaled_dot_product_flash_attention_for_cpu: causal_half(sdpa_flop_count, 0),
        kernels._scaled_dot_product_flash_attention_for_cpu_backward: causal_half(sdpa_backward_flop_count, 1),
    }
    with FlopCounterMode(display=False, custom_mapping=custom) as counted:
        work()
    return int(counted.get_total_flops())


def product() -> tuple[Callable[[], Any], int]:
    """A product of the models' own shape, which is faster here than square ones, and its FLOPs: what the machine can do."""
    x, weight, out = torch.randn(BATCH * LENGTH, DIM), torch.randn(HIDDEN, DIM), torch.empty(BATCH * LENGTH, HIDDEN)
    return lambda: [torch.mm(x, weight.t(), out=out) for _ in range(20)], 20 * 2 * out.numel() * DIM


def shares(work: Callable[[], Any]) -> dict[str, float]:
    """Of its time, that in each operation itself, the largest first, by torch's profiler."""
    work()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        work()
    times = {event.key: event.self_cpu_time_total for event in found.key_averages()}
    return {name: time / sum(times.values()) for name, time in sorted(times.items(), key=lambda x: -x[1])}


def best(rounds: int, *sides: Callable[[], Any]) -> list[float]:
    """CPU seconds of each side's best round; the sides take turns. The first round warms up."""
    times: list[list[float]] = [[] for _ in sides]
    for _ in range(rounds + 1):
        for side, seen in zip(sides, times, strict=True):
            begin = time.process_time()
            side()
            seen.append(time.process_time() - begin)
    return [min(seen[1:]) for seen in times]

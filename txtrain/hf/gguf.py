"""One file for llama.cpp (GGUF), through the `gguf` library: of classes that both it and transformers read alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from txtrain.errors import ConfigError
from txtrain.hf.name_map import Stored
from txtrain.hf.tensor_layout import to_theirs

if TYPE_CHECKING:
    from txtrain.data.tokenizer.tokenizer import Tokenizer
    from txtrain.hf.save import Saved

CLASSES = ("LlamaForCausalLM", "MistralForCausalLM")
_PLAIN = {  # fields of config.json of which the format, or its reader in transformers, knows one value
    "hidden_act": "silu", "sliding_window": None, "rope_scaling": None, "attention_bias": False, "mlp_bias": False,
}


def write_gguf(saved: Saved, path: Path, tokenizer: Tokenizer | None = None) -> None:
    """Write the file, tensor by tensor.

    Raises:
        ConfigError: the library is not installed, or the model is of another class or has what the format lacks.
    """
    try:
        import gguf
    except ImportError as e:
        raise ConfigError("`format=gguf` needs the gguf library: pip install 'txtrain[gguf]'.") from e
    config, model, hf = saved.config, saved.model.config, saved.hf
    if hf.architecture not in CLASSES:
        raise ConfigError(
            f"`format` must be hf for {hf.architecture}, but is gguf instead: of the classes that llama.cpp knows, "
            f"{' and '.join(CLASSES)} are written."
        )
    for name, value in _PLAIN.items():
        if config.get(name, value) != value:
            given = f"hf with {name} {config[name]!r}, but is gguf instead: there it is {value!r}"
            raise ConfigError(f"`format` must be {given}.")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(f"{model.family} of txtrain")
    writer.add_vocab_size(model.vocab_size)
    writer.add_context_length(model.max_seq_len)
    writer.add_embedding_length(model.dim)
    writer.add_block_count(model.n_layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    n_kv = config["num_key_value_heads"] or model.n_heads
    writer.add_head_count(model.n_heads)
    writer.add_head_count_kv(n_kv)
    head_dim = config["head_dim"] or model.dim // model.n_heads
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_freq_base(model.position.theta)
    writer.add_layer_norm_rms_eps(model.norm.eps)
    writer.add_file_type({torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}[saved.dtype])
    _add_tokenizer(writer, saved, tokenizer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.n_layers)
    stored = hf.stored(model, saved.shapes)
    kinds = {
        torch.float32: gguf.GGMLQuantizationType.F32, torch.float16: gguf.GGMLQuantizationType.F16,
        torch.bfloat16: gguf.GGMLQuantizationType.BF16,
    }
    for s in stored:
        dtype = _dtype(s, saved)
        raw = torch.empty(s.shape, dtype=dtype, device="meta")
        as_numpy = torch.empty(0, dtype=torch.int16 if dtype is torch.bfloat16 else dtype).numpy().dtype
        theirs = names.get_name(s.name, try_suffixes=(".weight",))
        assert theirs is not None, s.name
        writer.add_tensor_info(theirs, s.shape, as_numpy, raw.nbytes, raw_dtype=kinds[dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for s in stored:
        tensor = to_theirs(s, saved.tensors)
        if s.name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = _interleaved(tensor, model.n_heads if "q_proj" in s.name else n_kv)
        tensor = tensor.detach().to(_dtype(s, saved)).contiguous()
        writer.write_tensor_data(tensor.view(torch.int16).numpy() if tensor.dtype is torch.bfloat16 else tensor.numpy())
    writer.close()


def _dtype(stored: Stored, saved: Saved) -> torch.dtype:
    """Vectors are in float32, as llama.cpp wants them."""
    return torch.float32 if len(stored.shape) == 1 else saved.dtype


def _interleaved(weight: Tensor, n_heads: int) -> Tensor:
    """Rows of q or k in the order of llama.cpp, which rotates pairs of neighbours instead of halves."""
    halves = weight.reshape(n_heads, 2, -1, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def _add_tokenizer(writer: Any, saved: Saved, tokenizer: Tokenizer | None) -> None:
    """Its tokens and merges, if it is a byte-level BPE; llama.cpp runs no file without."""
    import gguf

    config = saved.model.config
    ids = {"bos": config.bos_token_id, "pad": config.pad_token_id}
    ends = config.eos_token_id
    ids["eos"] = ends[0] if isinstance(ends, tuple) else ends
    for name, value in ids.items():
        if value is not None and value < config.vocab_size:
            getattr(writer, f"add_{name}_token_id")(value)
    said = None if tokenizer is None else _bpe(tokenizer)
    if said is None:
        return
    tokens, merges, special = said
    kinds = [
        gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL if i in tokens else gguf.TokenType.UNUSED
        for i in range(config.vocab_size)
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([tokens.get(i, f"[UNUSED{i}]") for i in range(config.vocab_size)])
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)


def _bpe(tokenizer: Tokenizer) -> tuple[dict[int, str], list[str], set[int]] | None:
    """Tokens by id, merges, and ids of special tokens, of a byte-level BPE."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            return None
        said = json.loads(path.read_text(encoding="utf-8"))
    model = said.get("model", {})
    if model.get("type") != "BPE" or "ByteLevel" not in json.dumps(said.get("pre_tokenizer")):
        return None
    tokens = {i: token for token, i in model["vocab"].items()}
    added = said.get("added_tokens") or []
    tokens |= {token["id"]: token["content"] for token in added}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return tokens, merges, {token["id"] for token in added if token.get("special")}

"""One file for llama.cpp (GGUF), through the `gguf` library: of classes that both it and transformers read alike."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from txtrain.errors import ConfigError
from txtrain.hf.name_map import Stored
from txtrain.hf.tensor_layout import to_theirs

if TYPE_CHECKING:
    from txtrain.data.tokenizer.tokenizer import Tokenizer
    from txtrain.hf.save import Saved



class Format(NamedTuple):
    """How llama.cpp holds a class.

    one_value: fields of config.json of which it, or its reader in transformers, knows this value alone.
    """

    name: str  # of the architecture
    one_value: Mapping[str, Any]
    rotates: bool = True  # it has rotations, key-value heads and a norm of root mean squares
    interleaved: bool = False  # rotates pairs of neighbours instead of halves
    plus_one: bool = False  # weights of norms are those that multiply, not their distance from 1


_GATED = {"attention_bias": False, "mlp_bias": False, "rope_scaling": None}
_LLAMA = Format("llama", {**_GATED, "hidden_act": "silu", "sliding_window": None}, interleaved=True)
FORMATS = {
    "LlamaForCausalLM": _LLAMA, "MistralForCausalLM": _LLAMA,
    "GPT2LMHeadModel": Format("gpt2", {"activation_function": "gelu_new", "scale_attn_weights": True}, rotates=False),
    "Gemma2ForCausalLM": Format("gemma2", {
        **_GATED, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "head_dim": 256,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    }, plus_one=True),
}


# How texts are cut before merges, and whether whole words are looked up first: llama.cpp's name of it.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_SPLITS = {(_GPT2, False): "gpt-2", (_LLAMA3, True): "llama-bpe"}


class _Words(NamedTuple):
    """A byte-level BPE: tokens by id, merges, ids of the added tokens and of those that are special, and llama.cpp's
    name of its splits, if any."""

    tokens: dict[int, str]
    merges: list[str]
    added: set[int]
    special: set[int]
    splits: str | None


def write_gguf(saved: Saved, path: Path, tokenizer: Tokenizer | None = None) -> bool:
    """Write the file, tensor by tensor. Returns whether the tokenizer is in it.

    Raises:
        ConfigError: the library is not installed, or the model is of another class or has what the format lacks.
    """
    try:
        import gguf
    except ImportError as e:
        raise ConfigError("`format=gguf` needs the gguf library: pip install 'txtrain[gguf]'.") from e
    config, model, hf = saved.config, saved.model.config, saved.hf
    form = FORMATS.get(hf.architecture)
    if form is None:
        raise ConfigError(
            f"`format` must be hf for {hf.architecture}, but is gguf instead: of the classes that llama.cpp knows, "
            f"{', '.join(FORMATS)} are written."
        )
    alternate = ["full_attention" if i % 2 else "sliding_attention" for i in range(model.n_layers)]
    for name, value in {**form.one_value, "layer_types": alternate}.items():
        if config.get(name, value) != value:
            given = f"hf with {name} {config[name]!r}, but is gguf instead: there it is {value!r}"
            raise ConfigError(f"`format` must be {given}.")
    writer = gguf.GGUFWriter(path, form.name)
    _add_shape(writer, form, saved)
    writer.add_file_type({torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}[saved.dtype])
    has_tokenizer = _add_tokenizer(writer, saved, tokenizer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[form.name.upper()], model.n_layers)
    stored = [
        s._replace(transposed=False, shape=s.shape[::-1]) if s.transposed else s
        for s in hf.stored(model, saved.shapes)
    ]
    kinds = {
        torch.float32: gguf.GGMLQuantizationType.F32, torch.float16: gguf.GGMLQuantizationType.F16,
        torch.bfloat16: gguf.GGMLQuantizationType.BF16,
    }
    for s in stored:
        dtype = _dtype(s, saved)
        raw = torch.empty(s.shape, dtype=dtype, device="meta")
        as_numpy = torch.empty(0, dtype=torch.int16 if dtype is torch.bfloat16 else dtype).numpy().dtype
        theirs = names.get_name(s.name, try_suffixes=(".weight", ".bias"))
        assert theirs is not None, s.name
        writer.add_tensor_info(theirs, s.shape, as_numpy, raw.nbytes, raw_dtype=kinds[dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for s in stored:
        tensor = to_theirs(s, saved.tensors)
        if form.plus_one and s.name.endswith("norm.weight"):
            tensor = tensor.float() + 1
        if form.interleaved and s.name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = _interleaved(tensor, model.n_heads if "q_proj" in s.name else _n_kv(saved))
        tensor = saved.cast(tensor.detach(), _dtype(s, saved), s.name).contiguous()
        writer.write_tensor_data(tensor.view(torch.int16).numpy() if tensor.dtype is torch.bfloat16 else tensor.numpy())
    writer.close()
    return has_tokenizer


def _add_shape(writer: Any, form: Format, saved: Saved) -> None:
    config, model = saved.config, saved.model.config
    writer.add_name(f"{model.family} of txtrain")
    writer.add_vocab_size(model.vocab_size)
    writer.add_context_length(model.max_seq_len)
    writer.add_embedding_length(model.dim)
    writer.add_block_count(model.n_layers)
    writer.add_feed_forward_length(model.ffn.width(model))
    writer.add_head_count(model.n_heads)
    if form.rotates:
        writer.add_head_count_kv(_n_kv(saved))
        head_dim = config["head_dim"] or model.dim // model.n_heads
        writer.add_rope_dimension_count(head_dim)
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_rope_freq_base(config["rope_theta"])  # NTK scaling is another base
        writer.add_layer_norm_rms_eps(model.norm.eps)
        if window := config.get("sliding_window"):
            writer.add_sliding_window(window)
    else:
        writer.add_layer_norm_eps(model.norm.eps)


def _n_kv(saved: Saved) -> int:
    return saved.config["num_key_value_heads"] or saved.model.config.n_heads


def _dtype(stored: Stored, saved: Saved) -> torch.dtype:
    """Vectors are in float32, as llama.cpp wants them."""
    return torch.float32 if len(stored.shape) == 1 else saved.dtype


def _interleaved(weight: Tensor, n_heads: int) -> Tensor:
    """Rows of q or k in the order of llama.cpp, which rotates pairs of neighbours instead of halves."""
    halves = weight.reshape(n_heads, 2, -1, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def _add_tokenizer(writer: Any, saved: Saved, tokenizer: Tokenizer | None) -> bool:
    """Its tokens and merges, if it is a byte-level BPE that llama.cpp splits alike; it runs no file without."""
    import gguf

    config = saved.model.config
    ids = {"bos": config.bos_token_id, "pad": config.pad_token_id}
    ends = config.eos_token_id
    ids["eos"] = next(iter(ends), None) if isinstance(ends, tuple) else ends
    for name, value in ids.items():
        if value is not None and value < config.vocab_size:
            getattr(writer, f"add_{name}_token_id")(value)
    said = None if tokenizer is None else _bpe(tokenizer)
    if said is None or said.splits is None:
        return False
    tokens, merges, added, special, splits = said
    types = gguf.TokenType
    by_kind = ((special, types.CONTROL), (added, types.USER_DEFINED), (tokens, types.NORMAL))  # NORMAL: found by merges
    kinds = [next((kind for some, kind in by_kind if i in some), types.UNUSED) for i in range(config.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splits)
    writer.add_token_list([tokens.get(i, f"[UNUSED{i}]") for i in range(config.vocab_size)])
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    return True


def _bpe(tokenizer: Tokenizer) -> _Words | None:
    """None: it is none."""
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
    special = {token["id"] for token in added if token.get("special")}
    return _Words(tokens, merges, {token["id"] for token in added}, special, _splits(said))


def _splits(said: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for what a tokenizer.json does with a text before the merges; None: it does not know it."""
    first, model = said["pre_tokenizer"], said["model"]
    *others, last = first["pretokenizers"] if first["type"] == "Sequence" else [first]
    pattern = None
    if not others and last.get("use_regex", True):
        pattern = _GPT2
    elif len(others) == 1 and others[0]["type"] == "Split" and not last.get("use_regex", True):
        (split,) = others
        alike = split.get("behavior") == "Isolated" and not split.get("invert")
        pattern = split["pattern"].get("Regex") if alike else None
    changes = said.get("normalizer") or last.get("add_prefix_space", True) or model.get("end_of_word_suffix")
    if last["type"] != "ByteLevel" or changes or model.get("continuing_subword_prefix"):
        return None
    return _SPLITS.get((pattern or "", bool(model.get("ignore_merges"))))

"""What an unknown key was most likely meant to be: near names, and the names of other tools."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Collection, Mapping
from functools import cache
from typing import Any

from txtrain.errors import nearest
from txtrain.registry import TABLE, group_of

# Our key: names in Hugging Face, Lightning, nanoGPT, litgpt, Megatron. A name may be in several rows: the first key
# that the verb has is suggested.
_THEIRS = {
    "model.dim": "hidden_size d_model n_embd embed_dim embedding_dim",
    "model.n_layers": "num_hidden_layers num_layers n_layer depth",
    "model.n_heads": "num_attention_heads num_heads n_head",
    "model.max_seq_len": "max_position_embeddings n_positions n_ctx block_size context_length",
    "model.vocab_size": "padded_vocab_size n_vocab",
    "model.dropout": "hidden_dropout_prob hidden_dropout resid_pdrop embd_pdrop dropout_rate",
    "model.tie_word_embeddings": "tie_embeddings tie_weights tied tied_embeddings weight_tying",
    "model.logit_softcap": "final_logit_softcapping final_logit_softcap",
    "model.init.std": "initializer_range init_std",
    "model.norm_position": "pre_norm post_norm norm_first normalize_before",
    "model.attention.n_kv_heads": "num_key_value_heads num_query_groups n_query_groups n_kv_head kv_heads",
    "model.attention.window": "sliding_window sliding_window_size window_size",
    "model.attention.softcap": "attn_logit_softcapping attention_logit_softcapping",
    "model.attention.scale": "query_pre_attn_scalar attention_scores_scalar",
    "model.attention.bias": "attention_bias qkv_bias",
    "model.attention.dropout": "attention_dropout attn_pdrop attention_probs_dropout_prob",
    "model.ffn.hidden_dim": "intermediate_size ffn_dim ffn_hidden_size d_ff n_inner",
    "model.ffn.activation": "hidden_act hidden_activation activation_function",
    "model.ffn.bias": "mlp_bias ffn_bias",
    "model.ffn.n_experts": "num_experts n_routed_experts num_local_experts moe_num_experts",
    "model.ffn.top_k": "num_experts_per_tok moe_top_k moe_router_topk n_activated_experts",
    "model.ffn.n_shared": "n_shared_experts num_shared_experts",
    "model.ffn.aux_weight": "router_aux_loss_coef moe_aux_loss_coeff aux_loss_alpha aux_loss_coef",
    "model.ffn.bias_update_rate": "moe_router_bias_update_rate load_balance_coeff",
    "model.attention.kv_rank": "kv_lora_rank",
    "model.attention.q_rank": "q_lora_rank",
    "model.mtp_depth": "num_nextn_predict_layers num_mtp_layers mtp_num_layers",
    "model.position.theta": "rope_theta rope_base",
    "model.position.scaling": "rope_scaling rope_parameters",
    "model.norm.eps": "rms_norm_eps layer_norm_eps layer_norm_epsilon norm_eps",
    "data.global_batch_size": "batch_size train_batch_size total_batch_size global_train_batch_size",
    "data.micro_batch_size": (
        "per_device_train_batch_size per_device_batch_size device_batch_size "
        "accumulate_grad_batches gradient_accumulation_steps grad_accum_steps"
    ),
    "data.seq_len": "sequence_length seq_length max_seq_length max_length",
    "data.path": "dataset_path train_file data_dir data_files",
    "data.name": "dataset_config_name",
    "data.tokenizer": "tokenizer_name tokenizer_path tokenizer_name_or_path",
    "data": "dataset dataset_name",
    "optimizer.lr": "learning_rate max_lr base_lr",
    "optimizer.groups": "param_groups parameter_groups group_overrides",
    "optimizer": "optim optimizer_name",
    "ema.decay": "ema_decay ema_rate use_ema",
    "scheduler.warmup_steps": "warmup num_warmup_steps warmup_iters lr_warmup_iters warmup_ratio",
    "scheduler.min_lr_ratio": "min_lr min_lr_rate",
    "scheduler": "lr_scheduler lr_scheduler_type lr_decay_style",
    "trainer.max_steps": "max_iters train_iters total_steps num_steps num_train_steps n_steps",
    "trainer.max_epochs": "num_train_epochs num_epochs epochs n_epochs",
    "trainer.gradient_clip_val": "max_grad_norm max_norm grad_clip clip_grad clip_grad_norm",
    "trainer.val_check_interval": "eval_steps eval_interval eval_every val_interval",
    "trainer.limit_val_batches": "eval_iters max_eval_batches",
    "trainer.log_every_n_steps": "logging_steps log_interval log_every",
    "trainer.precision": "bf16 fp16 dtype torch_dtype mixed_precision",
    "trainer.compile": "torch_compile use_compile",
    "trainer.devices": "gpus n_gpus num_gpus nproc_per_node world_size",
    "strategy.tp_size": "tp tensor_parallel_size tensor_model_parallel_size tensor_parallel_degree",
    "strategy.ep_size": "ep expert_parallel_size expert_model_parallel_size expert_parallel_degree",
    "save.every_n_steps": "save_steps save_interval save_every ckpt_interval checkpoint_interval",
    "save.keep_last": "save_total_limit",
    "run_dir": "output_dir out_dir save_dir log_dir",
    "name": "run_name experiment_name",
    "seed": "random_seed",
    "resume": "resume_from_checkpoint ckpt_path",
    "logger": "report_to loggers",
    "max_new_tokens": "max_tokens max_length num_tokens n_tokens",
    "temperature": "temp",
    "checkpoint": "run model_path ckpt ckpt_path model_name_or_path",
    "prompt": "start input text prompts",
}
_DERIVED = {"accumulate_grad_batches", "gradient_accumulation_steps", "grad_accum_steps"}
_CHOICES = ("data", "optimizer", "scheduler", "logger")  # groups: an option is chosen, no value given


@cache
def _ours() -> dict[str, list[str]]:
    ours: dict[str, list[str]] = {}
    for key, words in _THEIRS.items():
        for word in words.split():
            ours.setdefault(word, []).append(key)
    return ours


def unknown_key(path: str, value: Any, siblings: Collection[str], known: Collection[str], axis: str | None) -> str:
    """The sentence about an unknown key, with the best guess.

    siblings: keys that exist beside it. known: keys of any combination of options. axis: of the option it was given to.
    """
    parent, _, name = path.rpartition(".")
    rest = ""
    # `model.atention.window=4` arrives as {window: 4} at model.atention
    while isinstance(value, Mapping) and len(value) == 1:
        key, value = next(iter(value.items()))
        rest += f".{key}"
    beside = [s for s in siblings if s != "type"]  # the group chooses `type`
    elsewhere = (
        (_of_another_option(name, axis) if path in known else "") or meant_elsewhere(parent, name, rest, beside, known)
    )
    near = nearest(name, beside)
    if elsewhere:
        guess = elsewhere
    else:
        said = f" Did you mean {parent + '.' if parent else ''}{near}{rest}?" if near else ""
        guess = said + (f" It has: {', '.join(beside)}." if beside else "")
    return f"`{path}{rest}={written(value)}`: {parent or 'the configuration'} has no key {name}.{guess}"


def _of_another_option(key: str, axis: str | None) -> str:
    options = TABLE.get(axis or "", {})
    owners = [
        f"{group_of(axis or '')}={name}" for name, option in options.items()
        if key in {f.name for f in dc.fields(option.config)}
    ]
    return f" Only {', '.join(owners)} {'has' if len(owners) == 1 else 'have'} it." if owners else ""


def meant_elsewhere(parent: str, name: str, rest: str, siblings: Collection[str], known: Collection[str]) -> str:
    """The key for another tool's name, or the key of that name elsewhere."""
    last = f"{name}{rest}".rpartition(".")[2]
    if last in _ours():
        return _translated(last, known)
    if nearest(name, siblings):
        return ""
    same = [path for path in known if path.rpartition(".")[2] == last]
    same.sort(key=lambda path: not (parent and path.startswith(f"{parent}.")))  # keys below `parent` first
    return f" Did you mean {same[0]}?" if same else ""


def _translated(word: str, known: Collection[str]) -> str:
    ours = next((key for key in _ours()[word] if key in known), None)
    if ours is None:
        return ""
    if word in _DERIVED:
        return f" Did you mean {ours}? Accumulation is derived: global_batch_size / (processes x micro_batch_size)."
    return f" Did you mean {ours}{'=NAME' if ours in _CHOICES else ''}?"


def written(value: object) -> str:
    """A value as written on the command line."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

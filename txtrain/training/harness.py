"""`tasks=`: a trained model in the hands of lm_eval (Gao et al.), without an export.

lm_eval's own class for models of Hugging Face does all the work, so that its figures are those of its `hf` model on the
export; here its calls of the model, and of `generate`, go to ours.
"""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from txtrain.checkpoint.load import load
from txtrain.config.schema_of_trained import Evaluate
from txtrain.errors import ConfigError
from txtrain.model.generation import generate
from txtrain.parallel.build import make_parallel

Found = dict[str, tuple[float, float | None, float | None, int]]
_NORMAL = 1.96  # standard errors on either side of a 95 % interval


def of_tasks(cfg: Evaluate, tokenizer: Path | None) -> Found:
    """METRIC/TASK -> the value, the ends of its interval from lm_eval's standard error, and the number of questions.

    Raises:
        ConfigError: lm_eval is not installed, knows no such task, or the model has no tokenizer.
    """
    if (folder := cfg.lm_eval.include_path) is not None and not Path(folder).is_dir():
        raise ConfigError(f"`lm_eval.include_path` must be a folder with tasks, but {folder!r} is none.")
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as e:
        raise ConfigError(f'`tasks` needs the package lm_eval: pip install "txtrain[eval]" ({e}).') from e
    assert cfg.checkpoint is not None
    if tokenizer is None:
        raise ConfigError(f"`checkpoint` must have a tokenizer with tasks, but {cfg.checkpoint!r} has none.")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=folder)
    if unknown := [name for name in cfg.tasks if not manager.match_tasks([name])]:
        raise ConfigError(
            f"`tasks` must be known to lm_eval, but {', '.join(unknown)} is not. Of your own: "
            "lm_eval.include_path=FOLDER."
        )
    device = make_parallel(cfg).device()
    loaded = load(cfg.checkpoint, device, weights=cfg.weights, finite=not cfg.allow_nonfinite)
    if cfg.trainer.precision == "bf16-true":
        loaded.model.bfloat16()
    seed = cfg.seed % 2**32
    made = lm_eval.simple_evaluate(
        model=_model(loaded.model, str(tokenizer), device, cfg), tasks=list(cfg.tasks), task_manager=manager,
        num_fewshot=cfg.lm_eval.num_fewshot, limit=cfg.lm_eval.limit, bootstrap_iters=cfg.n_bootstrap,
        log_samples=False, random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
    )
    found: Found = {}
    for task, values in made["results"].items():
        n = made["n-samples"].get(task, {}).get("effective", 0)
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            reach = _NORMAL * error if isinstance(error, int | float) else None
            name = f"{metric}/{task}" if kind == "none" else f"{metric}/{task}/{kind}"
            ends = (None, None) if reach is None else (value - reach, value + reach)
            found[name] = float(value), *ends, n
    return found


def _model(model: Any, tokenizer: str, device: torch.device, cfg: Evaluate) -> Any:
    """lm_eval's model."""
    from lm_eval.models.huggingface import HFLM

    class Ours(HFLM):  # type: ignore[misc]
        def _model_call(
            self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None
        ) -> Tensor:
            given = {"attention_mask": attn_mask, "labels": labels} if labels is not None else {}
            with torch.no_grad():
                logits: Tensor = model(input_ids=inps, **given).logits
            return logits

        def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **how: Any) -> Tensor:
            begin = 1 if two_stacks else context.shape[1]
            drawn = {name: how.get(name) for name in ("top_k", "top_p")} | {"temperature": how.get("temperature", 1.0)}
            return generate(
                model, context, how.get("attention_mask"), max_new_tokens=max(max_length - begin, 1),
                eos_token_id=self.eot_token_id, pad_token_id=self.tokenizer.pad_token_id,
                **(drawn if how.get("do_sample") else {"temperature": 0.0}),
            )

    two_stacks = cfg.model.topology == "encoder_decoder"
    told = SimpleNamespace(device=device, config=SimpleNamespace(model_type="txtrain"))
    return Ours(
        pretrained=told, backend="seq2seq" if two_stacks else "causal", tokenizer=tokenizer,
        max_length=cfg.model.max_seq_len, batch_size=cfg.micro_batch_size,
    )

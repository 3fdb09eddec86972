"""The Python surface: what `import txtrain` offers, each importing what it needs when it is called."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from txtrain import places

if TYPE_CHECKING:
    import torch
    from lightning.pytorch import Callback
    from torch import Tensor, nn

    from txtrain.config import Generate, Train
    from txtrain.data.module import DataModule
    from txtrain.data.tokenizer import Tokenizer
    from txtrain.model.config import ModelConfig
    from txtrain.model.transformer import Transformer
    from txtrain.planning import Figures
    from txtrain.run import Result


def families() -> list[str]:
    """The names that `model=` accepts: families at laptop size, and published models."""
    return places.options("model")


def compose(overrides: Sequence[str] = (), verb: str = "train", config_dir: str | None = None) -> Train | Generate:
    """The typed, validated configuration that `txtrain VERB OVERRIDES` would run. config_dir: your own options and recipes.

    Raises:
        ConfigError: what the command line would refuse, in the same words.
    """
    from txtrain.composition import compose as composed

    return composed(overrides, verb, config_dir)


def build_model(config: ModelConfig) -> Transformer:
    """The model, initialised by the family's rule from torch's generator; on "meta" under `torch.device("meta")`."""
    from txtrain.model.build import build_model as built

    return built(config)


def train(cfg: Train, model: nn.Module | None = None, data: DataModule | None = None, callbacks: Sequence[Callback] = ()) -> Result:
    """Train as `txtrain train` does, with your own model, data or Lightning callbacks where given.

    Returns:
        run_dir, and metrics: the last values of loss, val_loss, ...
    """
    from txtrain.run import train as trained

    return trained(cfg, model=model, data=data, callbacks=callbacks)


def plan(cfg: Train) -> Figures:
    """Parameters, FLOPs, cache, steps and time of what `train` would run, in closed form: nothing is built, torch stays out.

    cfg: composed with verb="plan" it also says of which devices the time is (`plan.device`, `plan.mfu`, ...).
    """
    from txtrain.planning import figures

    return figures(cfg)


def load_pretrained(where: str | os.PathLike[str], dtype: torch.dtype | None = None) -> Transformer:
    """The model of a Hugging Face folder, an export, a run or a checkpoint, in eval mode. See `txtrain.loading.load_pretrained`."""
    from txtrain.loading import load_pretrained as loaded

    return loaded(where, dtype)


def save_pretrained(model: Transformer, folder: str | os.PathLike[str], tokenizer: Tokenizer | None = None) -> None:
    """Write a Hugging Face folder: config.json, model.safetensors, the tokenizer. See `txtrain.hf.saving.save_pretrained`."""
    from txtrain.hf.saving import save_pretrained as saved

    saved(model, folder, tokenizer)


def generate(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 32,
    temperature: float = 0.0,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | None = None,
    on_token: Callable[[Tensor], None] | None = None,
    **token_ids: Any,
) -> Tensor:
    """Prompts [B, T] and what the model says to them [B, T + new]. See `txtrain.generation.generate`.

    token_ids: eos_token_id (None: never stop), pad_token_id.
    """
    from txtrain.generation import generate as generated

    return generated(
        model,
        input_ids,
        attention_mask,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        on_token=on_token,
        **token_ids,
    )

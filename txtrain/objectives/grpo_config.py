"""GRPO's keys. No torch."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from txtrain.errors import divisors_near
from txtrain.objectives.base_config import ObjectiveConfig, Rollout, Shapes
from txtrain.registry import config, knob
from txtrain.run_config import RunConfig


@config
class GRPOConfig(ObjectiveConfig):
    """Group relative policy optimisation (2402.03300, 2501.12948), its variants, and REINFORCE and RLOO.

    DAPO (2503.14476): normalise=token, clip_high=0.28, beta=0. Dr. GRPO (2503.20783): normalise=constant,
    divide_by_std=false. GSPO (2507.18071): ratio=sequence, clip_low=3e-4, clip_high=4e-4. CISPO (2506.13585):
    loss=cispo, normalise=token.
    """

    topologies: ClassVar = ("decoder",)
    heads: ClassVar = ("lm",)
    reads: ClassVar = ("problems",)

    group_size: int = knob(8, at_least=2)  # completions of each prompt
    prompts_per_rollout: int | None = knob(None, at_least=1)  # null: data.global_batch_size / group_size
    # optimizer updates on one rollout's completions, each on data.global_batch_size of them, in turn
    updates_per_rollout: int = knob(1, at_least=1)
    max_new_tokens: int = knob(16, at_least=1)  # of a completion; prompts have the rest of data.seq_len
    temperature: float = knob(1.0, above=0)
    top_p: float = knob(1.0, above=0, at_most=1)
    # weight of the KL divergence from the reference; 0: no reference is read
    beta: float = knob(0.04, at_least=0)
    # as init_from; null: the weights with which the run begins
    reference: str | None = knob(None, literal=True)
    # every so many updates the policy becomes the reference (2501.12948: 400; 2505.24864); null: never
    reference_reset: int | None = knob(None, at_least=1)
    # loss: k3 of each token (2402.03300, equation 4); reward: log p - log of the reference's (k1), summed over a
    # completion's tokens, is taken off its reward (2203.02155)
    kl_in: Literal["loss", "reward"] = "loss"
    clip_low: float = knob(0.2, at_least=0, at_most=1)  # the ratio is clipped at 1 - clip_low and 1 + clip_high
    clip_high: float = knob(0.2, at_least=0)
    # sequence: each completion weighs the same (GRPO); token: each token of the batch (DAPO); constant: each completion
    # by its length over max_new_tokens (Dr. GRPO)
    normalise: Literal["sequence", "token", "constant"] = "sequence"
    # divide a group's advantages by its standard deviation; null: true for loss=grpo and cispo
    divide_by_std: bool | None = None
    ratio: Literal["token", "sequence"] = "token"  # sequence: the geometric mean over the completion (GSPO)
    # grpo: the clipped objective; cispo: a clipped weight without gradient; reinforce: no baseline; rloo: the mean of
    # the group's others; the last two have no ratio
    loss: Literal["grpo", "cispo", "reinforce", "rloo"] = "grpo"
    mask_truncated: bool = False  # completions without an end token count neither in the loss nor in its denominator
    # false, to debug: each token is of a forward over its whole row, padded to data.seq_len, as an update's; then
    # sampler_difference is exactly 0 in float32. Needs data.micro_batch_size=1
    use_cache: bool = True
    # also sampled of each held-out problem at a validation, for val_pass@1 and val_pass@N by the reward `answer`
    val_samples: int = knob(0, at_least=0)

    @property
    def models(self) -> Mapping[str, str]:
        return {} if self.reference is None else {"reference": self.reference}

    @property
    def start(self) -> str | None:
        return "reference" if self.beta and self.reference is None else None

    @property
    def reads_start(self) -> bool:  # type: ignore[override]
        return self.start is not None

    @property
    def resets(self) -> bool:  # type: ignore[override]
        return self.reference_reset is not None

    @property
    def uncounted(self) -> str | None:
        chosen = [f"objective.top_p={self.top_p}"] if self.top_p < 1 else []
        chosen += [] if self.use_cache else ["objective.use_cache=false"]
        return f"{' and '.join(chosen)}: the loss holds whole logits" if chosen else None

    def prompts(self, config: RunConfig) -> int:
        return self.prompts_per_rollout or max(1, config.data.global_batch_size // self.group_size)

    def rollout(self, config: RunConfig) -> Rollout:
        n, (read, new) = self.prompts(config), self.lengths(config.seq_len)
        return Rollout(n, n * self.group_size, read, new, self.updates_per_rollout, 2 if self.beta else 1)

    def arguments(self, config: RunConfig) -> dict[str, Any]:
        has_ratio = self.loss in ("grpo", "cispo")
        return super().arguments(config) | {
            "prompts_per_rollout": self.prompts(config), "reward": config.reward, "seed": config.seed,
            "whole": None if self.use_cache else config.seq_len, "counts_tokens": self._counts_tokens(config),
            "divide_by_std": has_ratio if self.divide_by_std is None else self.divide_by_std,
        }

    def _counts_tokens(self, config: RunConfig) -> bool:
        """Without a cache the sampler reads rows as wide as training does, padding as tokens."""
        return self.use_cache and config.model.counts_tokens

    def lengths(self, seq_len: int) -> tuple[int, int]:
        return seq_len - self.max_new_tokens, self.max_new_tokens

    def batch_shapes(self, config: RunConfig, n: int) -> Shapes:
        of_tokens = ("input_ids", "labels", "old_log_probs", *(("reference_log_probs",) if self.beta else ()))
        mask = {"attention_mask": (n, config.seq_len)} if self._counts_tokens(config) else {}
        return dict.fromkeys(of_tokens, (n, config.seq_len)) | mask | {"advantages": (n,)}

    def check(self) -> Iterator[str]:
        if not self.beta and self.reference is not None:
            yield f"`objective.reference` must be null with objective.beta=0, but is {self.reference} instead."
        if (n := self.reference_reset) is not None:
            if not self.beta or self.reference is not None:
                why = "objective.beta=0" if not self.beta else "objective.reference, which is never reset"
                yield f"`objective.reference_reset` must be null with {why}, but is {n} instead."
            elif n % self.updates_per_rollout:
                yield (
                    "`objective.reference_reset` must be a multiple of objective.updates_per_rollout "
                    f"({self.updates_per_rollout}), since a rollout has one reference, but is {n} instead. Nearest: "
                    f"{self.updates_per_rollout * max(1, round(n / self.updates_per_rollout))}."
                )
        if self.loss in ("reinforce", "rloo"):
            if self.updates_per_rollout > 1:
                yield (
                    f"`objective.updates_per_rollout` must be 1 with objective.loss={self.loss}, which has no ratio "
                    f"for weights that have moved on, but is {self.updates_per_rollout} instead. Nearest: 1."
                )
            if self.ratio != "token":
                yield f"`objective.ratio` must be token with objective.loss={self.loss}, but is {self.ratio} instead."
            for name in ("clip_low", "clip_high"):
                if (value := getattr(self, name)) != (default := getattr(type(self), name)):
                    yield (
                        f"`objective.{name}` must be {default} with objective.loss={self.loss}, which has no ratio to "
                        f"clip, but is {value} instead."
                    )

    def check_with(self, config: RunConfig) -> Iterator[str]:
        size, n = config.data.global_batch_size, self.prompts(config) * self.group_size
        if n % size:
            yield (
                f"`data.global_batch_size` must divide the {n} completions of a rollout (objective.prompts_per_rollout="
                f"{self.prompts(config)} times group_size={self.group_size}), but is {size} instead. Nearest: "
                f"{', '.join(map(str, divisors_near(size, n)))}."
            )
        elif self.updates_per_rollout * size % n:
            yield (
                f"`objective.updates_per_rollout` must be a multiple of {n // size}, so that each of the {n} "
                f"completions of a rollout is trained on equally often, but is {self.updates_per_rollout} instead. "
                f"Nearest: {n // size * max(1, round(self.updates_per_rollout * size / n))}."
            )
        if config.seq_len <= self.max_new_tokens:
            yield (
                f"`objective.max_new_tokens` must be below data.seq_len ({config.seq_len}), which includes the prompt, "
                f"but is {self.max_new_tokens} instead."
            )
        if self.val_samples and "answer" not in config.reward.use:
            yield (
                "`objective.val_samples` must be 0 without the reward `answer`, which says what is right, but is "
                f"{self.val_samples} instead. To measure it alone: reward=[answer,...] reward.answer.weight=0."
            )
        if not self.use_cache and config.model.ffn.n_experts:
            yield (
                "`objective.use_cache` must be true for a model with experts, but is false instead: they see other "
                "tokens together while sampling."
            )
        elif not self.use_cache and config.data.micro_batch_size != 1:
            yield (
                "`data.micro_batch_size` must be 1 with objective.use_cache=false, so that sampling and updates make "
                f"the same forwards, but is {config.data.micro_batch_size or 'null'} instead."
            )
        for key in (*dropouts(config.model, "model"), *dropouts(config.adapter, "adapter")):
            yield f"`{key}` must be 0 with objective=grpo, which compares probabilities of new and old weights."
        if config.trainer.max_epochs is not None:
            yield "`trainer.max_epochs` must be null with objective=grpo: its samples are made. Give trainer.max_steps."

    def check_ranks(self, config: RunConfig, n: int) -> Iterator[str]:
        if (prompts := self.prompts(config)) % n:
            near = ", ".join(str(k) for k in (prompts // n * n, prompts // n * n + n) if k)
            yield (
                f"`objective.prompts_per_rollout` must be a multiple of the {n} ranks that see different samples, but "
                f"is {prompts} instead. Nearest: {near}."
            )


def dropouts(config: Any, path: str) -> Iterator[str]:
    """Keys of dropouts that are not 0, in a config and the configs in it."""
    for f in dc.fields(config):
        value, key = getattr(config, f.name), f"{path}.{f.name}"
        if dc.is_dataclass(value):
            yield from dropouts(value, key)
        elif f.metadata.get("affects") == "dropout" and value:
            yield key

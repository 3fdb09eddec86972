"""Reinforcement learning on groups of sampled completions with rewards: GRPO and its relatives."""

# N completions of a rollout, B rows of a batch, T positions

from __future__ import annotations

import dataclasses as dc
import logging
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from txtrain.data.samples.order import GlobalOrder, RolloutOrder
from txtrain.data.samples.prompts import problem_of
from txtrain.errors import ConfigError
from txtrain.model.config import Sampling
from txtrain.model.decoding import Rows, Written, evaluating
from txtrain.model.generation import Decoding, continue_rows
from txtrain.model.sampling import processed
from txtrain.model.transformer import LossOf
from txtrain.objectives import policy_gradient, rollout_file
from txtrain.objectives.base import IGNORED, Batch, Counted, Objective, Shown, Statistics, Terms, stacked
from txtrain.objectives.continuations import end_tokens
from txtrain.objectives.policy_gradient import Loss, Normalise, Ratio
from txtrain.objectives.rewards import ANSWER, Rewards, jobs_of
from txtrain.run_config import RewardConfig, RunConfig

log = logging.getLogger(__name__)

_BOUND = 0.02  # nats: a larger mean difference of sampler and trainer is said on the screen


class GRPO(Objective):
    """Completions of prompts are sampled from the weights that are trained, rewarded, and made more or less likely.

    A rollout has group_size completions of each of prompts_per_rollout prompts; its updates train on
    data.global_batch_size of them each, in turn. The old log-probabilities are the trainer's own, computed once when a
    rollout is made: so the ratio of a rollout's first update is exactly 1. The sampler's are compared with them.
    """

    def __init__(
        self, group_size: int, prompts_per_rollout: int, updates_per_rollout: int, max_new_tokens: int,
        temperature: float, top_p: float, beta: float, clip_low: float, clip_high: float, normalise: Normalise,
        divide_by_std: bool, ratio: Ratio, loss: Loss, mask_truncated: bool, kl_in: str, reward: RewardConfig,
        seed: int, counts_tokens: bool, val_samples: int, reference_reset: int | None, whole: int | None,
    ) -> None:
        self.group_size, self.prompts, self.updates = group_size, prompts_per_rollout, updates_per_rollout
        self.how = Sampling(
            max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, n=group_size, seed=seed
        )
        self.best = Sampling(max_new_tokens=max_new_tokens, temperature=0.0)
        self.drawn = dc.replace(self.how, n=val_samples) if val_samples else None
        self.beta, self.kl_in, self.clip = beta, kl_in, (clip_low, clip_high)
        self.normalise, self.divide_by_std, self.ratio, self.loss = normalise, divide_by_std, ratio, loss
        self.mask_truncated, self.counts_tokens, self.reset = mask_truncated, counts_tokens, reference_reset
        self.whole = whole  # all rows of updates are padded to that length; see `Text`
        self.rewards = Rewards(reward)
        each = tuple(f"reward/{name}" for name in reward.use)
        self.reports = ("ratio_deviation", "clipped_share", *(("kl",) if beta else ()))
        self.measures = (
            "reward", *each, "reward_std", "silent_groups", "truncated_share", "length", "entropy",
            "sampler_difference", "sampler_difference_max",
        )
        self.clocks = ("rollout_seconds", "reward_seconds", "rollout_tokens_per_second", "time/rollout", "time/reward")
        self.metrics = ("val_reward", *(f"val_{name}" for name in each), "val_truncated_share", "val_length")
        if val_samples:
            self.metrics += tuple(dict.fromkeys(("val_pass@1", f"val_pass@{val_samples}")))
        self.rollout: dict[str, Tensor] = {}  # of all ranks, on the CPU, see `_roll_out`
        self.of_step: dict[str, float] = {}
        self._texts: list[rollout_file.Sampled] = []  # the first of the latest rollout here, as many as are shown
        self._n_shown = 0
        self._warned = False

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.reports, *self.measures, *self.clocks, *self.metrics)

    def order(self, n: int, seed: int, overfit_batches: int) -> GlobalOrder:
        return RolloutOrder(n, self.prompts, seed, overfit_batches, updates=self.updates)

    def meet(self, parallel: Any, tokenizer: Any) -> None:
        self.parallel, self.tokenizer = parallel, tokenizer

    def begin(self, module: Any, data: Any) -> None:
        if data is None or data.tokenizer is None:
            raise ConfigError("`objective=grpo` must have the data of txtrain.DataModule, which rewards read.")
        self.meet(module.parallel, data.tokenizer)
        self._n_shown = module.config.sample.n
        if self.prompts % self.parallel.size:
            raise ConfigError(
                f"`objective.prompts_per_rollout` must be a multiple of the {self.parallel.size} ranks that see "
                f"different samples, but is {self.prompts} instead."
            )

    # --------------------------------------------------------------------------------------------------------- training

    def step_batch(self, module: Any, batch: Batch) -> Batch:
        number, update = divmod(module.step, self.updates)
        if not self.rollout or int(self.rollout["number"]) != number:
            with module.parallel.phases.within("rollout"):
                self._roll_out(module, batch, number)
        size = int(module.config.data.global_batch_size)
        begin = update * size % len(self.rollout["input_ids"]) + self.parallel.rank * (size // self.parallel.size)
        rows = slice(begin, begin + size // self.parallel.size)
        made = {name: self.rollout[name][rows].to(module.device) for name in self._trained}
        longest = self.whole or int(made["attention_mask"].sum(1).max())
        return {name: value[:, :longest] if value.ndim == 2 else value for name, value in made.items()}

    @property
    def _trained(self) -> tuple[str, ...]:
        always = ("input_ids", "attention_mask", "labels", "old_log_probs", "advantages")
        return (*always, "reference_log_probs") if self.beta else always

    def denominators(self, batch: Batch) -> Terms:
        mask_BT = batch["labels"] != IGNORED
        tokens = mask_BT.sum()
        return {"loss": policy_gradient.count(mask_BT, self.normalise), **dict.fromkeys(self.reports, tokens)}

    def __call__(self, model: Callable[..., Any], batch: Batch, denominators: Terms) -> Terms:
        terms: Terms = {}

        def loss_of(head: Any, x_BTD: Tensor, embedding_VD: Tensor | None) -> Tensor:
            log_p_BT = self._log_probs_of(head, x_BTD, embedding_VD, batch["labels"])
            terms.update(self._terms(log_p_BT, batch, denominators))
            return terms["loss"]

        tokens = denominators["ratio_deviation"]
        loss = self._forward(model, batch, loss_of, num_items_in_batch=tokens).loss
        return {**terms, "loss": loss}

    def _terms(self, log_p_BT: Tensor, batch: Batch, denominators: Terms) -> Terms:
        mask_BT = batch["labels"] != IGNORED
        low, high = self.clip
        found = policy_gradient.surrogate(
            log_p_BT, batch["old_log_probs"].to(log_p_BT), batch["advantages"].to(log_p_BT), mask_BT,
            loss=self.loss, ratio=self.ratio, clip_low=low, clip_high=high,
        )
        losses_BT = found.losses
        sums = {"ratio_deviation": found.deviations, "clipped_share": found.clipped.to(log_p_BT)}
        if self.beta:
            kl_BT = policy_gradient.k3(log_p_BT, batch["reference_log_probs"].to(log_p_BT))
            sums["kl"] = kl_BT.detach()
            if self.kl_in == "loss":
                losses_BT = losses_BT + self.beta * kl_BT
        weights_BT = policy_gradient.token_weights(mask_BT, self.normalise, self.how.max_new_tokens).to(log_p_BT)
        loss = (losses_BT.masked_fill(~mask_BT, 0.0) * weights_BT).sum() / denominators["loss"]
        said = {name: value.masked_fill(~mask_BT, 0.0).sum() / denominators[name] for name, value in sums.items()}
        return {"loss": loss, **said}

    def log_probs(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """[B, T]: of each label at the temperature and top_p of the sampler, 0 where there is none.

        With top_p a label outside of today's nucleus is taken into it: its ratio stays finite.
        """
        found: list[Tensor] = []

        def loss_of(head: Any, x_BTD: Tensor, embedding_VD: Tensor | None) -> Tensor:
            found.append(self._log_probs_of(head, x_BTD, embedding_VD, batch["labels"]))
            return x_BTD.new_zeros(())

        self._forward(model, batch, loss_of)
        return found[0]

    def _forward(self, model: Callable[..., Any], batch: Batch, loss_of: LossOf, **further: Any) -> Any:
        """`loss_of` computes within the forward: so the auxiliary losses of experts weigh as this loss does."""
        names = ("input_ids", "labels", *(["attention_mask"] if self.counts_tokens else []))
        return model(**{name: batch[name] for name in names}, return_logits=False, loss_of=loss_of, **further)

    def _log_probs_of(self, head: Any, x_BTD: Tensor, embedding_VD: Tensor | None, labels_BT: Tensor) -> Tensor:
        how = self.how
        if how.top_p == 1 and self.whole is None:
            found: Tensor = head.log_probs(x_BTD, embedding_VD, labels_BT, how.heat)
            return found
        chosen_BT = labels_BT[:, 1:] != IGNORED
        logits_MV = head(x_BTD, embedding_VD)[:, :-1][chosen_BT]
        labels_M1 = labels_BT[:, 1:][chosen_BT][:, None]
        hot_MV = logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32)) / how.heat
        left_out_MV = processed(logits_MV.detach(), how).isneginf().scatter(1, labels_M1, False)
        log_p_M = hot_MV.masked_fill(left_out_MV, -torch.inf).log_softmax(-1).gather(1, labels_M1)[:, 0]
        blank_BT = torch.zeros_like(labels_BT, dtype=log_p_M.dtype)
        return blank_BT.masked_scatter(torch.nn.functional.pad(chosen_BT, (1, 0)), log_p_M)

    # ---------------------------------------------------------------------------------------------------------- rollout

    @torch.no_grad()
    def _roll_out(self, module: Any, batch: Batch, number: int) -> None:
        """Sample, reward and keep the completions of all ranks, in the order of prompts and samples.

        batch: the prompts of this rank; `sample_index` numbers them over the whole run, and with it their draws.
        """
        if self.reset and module.step and module.step % self.reset == 0:
            self.parallel.copy_weights(module.model, self.models["reference"])
            self.moved = frozenset(["reference"])
        began = time.perf_counter()
        prompts = _rows(batch)
        problems = [problem_of(text) for text in batch["problem"]]
        index = batch["sample_index"].tolist()
        written = self._written(module.model, prompts, self.how, module, index)
        jobs = jobs_of(problems, written, self.tokenizer)
        rewarding = time.perf_counter()
        with module.parallel.phases.within("reward"):
            values = self.parallel.together(lambda: self.rewards(jobs))
        rewarded = time.perf_counter()
        mine = self._rows_of(module, prompts, written, values, index)
        rows = {at: row for part in self.parallel.of_all(mine) for at, row in part.items()}  # ranks of tp have the same
        self.rollout = {"number": torch.tensor(number), **self._together([rows[at] for at in sorted(rows)])}
        self._measure()
        seconds = {"rollout_seconds": rewarding - began, "reward_seconds": rewarded - rewarding}
        speed = float(self.rollout["n_new"].sum()) / max(seconds["rollout_seconds"], 1e-9)
        self.of_step |= seconds | {"rollout_tokens_per_second": speed}
        firsts = [*zip(jobs, values, strict=True)][: self._n_shown]
        self._texts = [rollout_file.Sampled(job.prompt, job.completion, value) for job, value in firsts]

    def _written(
        self, model: Any, prompts: Rows, how: Sampling, module: Any = None, index: Sequence[int] | None = None
    ) -> list[Written]:
        ends = end_tokens(model.config, self.tokenizer)
        together = None if module is None else module.config.data.micro_batch_size
        whole = None if module is None else self.whole
        device = next(model.parameters()).device
        job = Decoding(
            how, ends, together, ranks=self.parallel, on_step=lambda _: self.check(), device=device, whole=whole
        )
        return continue_rows(model, prompts, job, index)

    def _rows_of(
        self, module: Any, prompts: Rows, written: Sequence[Written], values: Sequence[Mapping[str, float]],
        index: Sequence[int],
    ) -> dict[int, dict[str, Any]]:
        """This rank's completions, by their number over the whole run."""
        n = self.group_size
        asked = [prompts[i // n] for i in range(len(written))]
        ids = [[*prompt, *row.ids.tolist()] for prompt, row in zip(asked, written, strict=True)]
        input_ids, mask = self._padded(ids, module.device)
        labels = input_ids.masked_fill(mask == 0, IGNORED)
        for row, prompt in zip(labels, asked, strict=True):
            row[: len(prompt)] = IGNORED
        batch = {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
        old = self._computed(module.model, batch, module)
        reference = self._computed(self.models["reference"], batch, module) if self.beta else old
        made = {}
        for i, (row, value) in enumerate(zip(written, values, strict=True)):
            begin, end = len(asked[i]), len(ids[i])
            made[index[i // n] * n + i % n] = {
                "ids": ids[i], "n_prompt": begin, "ended": row.ended, "rewards": [*value.values()],
                "total": self.rewards.total(value), "old": old[i][begin:end].cpu(), "sampler": row.log_probs.cpu(),
                "reference": reference[i][begin:end].cpu() if self.beta else None,
            }
        return made

    def _computed(self, model: Any, batch: Batch, module: Any) -> Tensor:
        size = module.config.micro_batch_size
        parts = [
            {name: value[at : at + size] for name, value in batch.items()}
            for at in range(0, len(batch["input_ids"]), size)
        ]
        with evaluating(module.model):
            return torch.cat([self.log_probs(model, part) for part in parts])

    def _together(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        cpu = torch.device("cpu")
        ids, mask = self._padded([row["ids"] for row in rows], cpu)
        labels = torch.full_like(ids, IGNORED)
        blank = torch.zeros(ids.shape, dtype=torch.float32)
        made = {"old_log_probs": blank, "sampler_log_probs": blank.clone()}
        made |= {"reference_log_probs": blank.clone()} if self.beta else {}
        for i, row in enumerate(rows):
            new = slice(row["n_prompt"], len(row["ids"]))
            if row["ended"] or not self.mask_truncated:
                labels[i, new] = ids[i, new]
            for name in made:
                made[name][i, new] = row[name.removesuffix("_log_probs")].float()
        total = torch.tensor([row["total"] for row in rows], dtype=torch.float64)
        if self.beta and self.kl_in == "reward":
            kl = [policy_gradient.k1(row["old"], row["reference"]).sum().double() for row in rows]
            total = total - self.beta * torch.stack(kl).cpu()
        advantages = policy_gradient.advantages(total.view(-1, self.group_size), self.loss, self.divide_by_std)
        return {
            **made, "input_ids": ids, "attention_mask": mask, "labels": labels, "total": total,
            "advantages": advantages.flatten(),
            "rewards": torch.tensor([row["rewards"] for row in rows], dtype=torch.float64),
            "ended": torch.tensor([row["ended"] for row in rows]),
            "n_new": torch.tensor([len(row["ids"]) - row["n_prompt"] for row in rows]),
        }

    def _padded(self, rows: Rows, device: torch.device) -> tuple[Tensor, Tensor]:
        """Ids and attention mask, [N, T]: as long as the longest row, or `whole`."""
        lengths = torch.tensor([len(row) for row in rows], device=device)
        T = self.whole or int(lengths.max())
        ids = torch.tensor([[*row, *[0] * (T - len(row))] for row in rows], device=device)
        return ids, (torch.arange(T, device=device) < lengths[:, None]).long()

    def _measure(self) -> None:
        """What is said of a rollout; a function of it, so that a resumed run says the same."""
        r = self.rollout
        groups = r["total"].view(-1, self.group_size)
        n = float(r["n_new"].sum())
        apart = (r["old_log_probs"] - r["sampler_log_probs"]).abs()
        each = dict(zip(self.rewards.names, r["rewards"].mean(0).tolist(), strict=True))
        self.of_step = {
            "reward": float(r["total"].mean()), **{f"reward/{name}": value for name, value in each.items()},
            "reward_std": float(groups.std(1).mean()),
            "silent_groups": float((groups == groups[:, :1]).all(1).double().mean()),
            "truncated_share": float((~r["ended"]).double().mean()),
            "length": float(r["n_new"].double().mean()),
            "entropy": -float(r["sampler_log_probs"].double().sum()) / n,
            "sampler_difference": float(apart.double().sum()) / n, "sampler_difference_max": float(apart.max()),
        }
        if self.of_step["sampler_difference"] > _BOUND and not self._warned:
            self._warned = True
            log.warning(
                "sampler and trainer differ by %.3g nats a token (more than %s): the ratio of old and new weights is "
                "that wrong; trainer.precision=32-true brings them together",
                self.of_step["sampler_difference"], _BOUND,
            )

    # ------------------------------------------------------------------------------------------------------- checkpoint

    def state(self) -> Callable[[Path], None]:
        return partial(rollout_file.write, tensors=self.rollout, texts=self._texts)

    def load_state(self, folder: Path) -> None:
        if (found := rollout_file.read(folder, with_reference=bool(self.beta))) is not None:
            self.rollout, self._texts = found
            self._measure()

    # ------------------------------------------------------------------------------------------------------- validation

    def validate(self, model: Any, batch: Batch) -> Counted:
        found = self.measure(model, batch, None)
        return {name: (table[:, 0].sum(), table[:, 1].sum()) for name, table in found.items()}

    def measure(self, model: Any, batch: Batch, token_bytes: Tensor | None) -> Statistics:
        """The rewards of the most likely completions; `loss` is the negative of their sum. Of val_samples sampled ones
        the share that the reward `answer` calls right, and whether any of them is."""
        written, values = self._rewarded(model, batch, self.best)
        totals = [self.rewards.total(value) for value in values]
        found = {
            "loss": [-total for total in totals], "val_reward": totals,
            **{f"val_reward/{name}": [value[name] for value in values] for name in self.rewards.names},
            "val_truncated_share": [not row.ended for row in written],
            "val_length": [len(row.ids) for row in written],
        }
        if self.drawn is not None:
            _, values = self._rewarded(model, batch, self.drawn)
            right = torch.tensor([value[ANSWER] for value in values], dtype=torch.float64).view(-1, self.drawn.n) == 1
            found |= {"val_pass@1": right.double().mean(1), f"val_pass@{self.drawn.n}": right.any(1)}
        ones = torch.ones(len(written))
        return {
            name: stacked(torch.as_tensor(value, dtype=torch.float64), ones) for name, value in found.items()
        }

    def _rewarded(self, model: Any, batch: Batch, how: Sampling) -> tuple[list[Written], list[dict[str, float]]]:
        """how.n completions of each problem, whose draws depend on the seed and the problem."""
        problems = [problem_of(text) for text in batch["problem"]]
        index = [zlib.crc32(problem["prompt"].encode()) for problem in problems]
        written = self._written(model, _rows(batch), how, index=index)
        jobs = jobs_of(problems, written, self.tokenizer)
        return written, self.parallel.together(lambda: self.rewards(jobs))

    def show(self, module: Any, data: Any, config: RunConfig, check: Callable[[], None]) -> list[Shown]:
        """The latest rollout's first completions and their rewards."""
        return [
            Shown(prompt, f"{completion}  [{', '.join(f'{name} {value:g}' for name, value in values.items())}]")
            for prompt, completion, values in self._texts[: config.sample.n]
        ]


def _rows(batch: Batch) -> list[list[int]]:
    return [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]

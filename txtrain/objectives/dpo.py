"""Preference optimisation: DPO (Rafailov et al. 2023, 2305.18290) and IPO (Azar et al. 2023, 2310.12036).

With pi the log-probability of an answer, the sum over its tokens, and ref that of the reference:

    margin  h = (pi(chosen) - ref(chosen)) - (pi(rejected) - ref(rejected))
    DPO         -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)       e: label_smoothing
    IPO         (h - 1 / (2 beta))^2

A row holds both answers of each pair, as neighbouring documents, so that one forward reads them.
"""

# B rows, T tokens of a row, P pairs of a row (some of them empty), 2: the preferred answer and the other one

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from txtrain.data.samples.best_fit import PreferenceSamples, pairs_of
from txtrain.data.samples.rows import Rows
from txtrain.data.samples.text import TokenisedText
from txtrain.data.sources.source import SPLITS
from txtrain.data.store.cache import cached, find
from txtrain.data.store.split import digest
from txtrain.errors import ConfigError
from txtrain.objectives.base import IGNORED, Batch, Objective, Shown, Terms, n_targets
from txtrain.objectives.sft import answers
from txtrain.run_config import RunConfig

FORMAT = "reference 1"  # part of the name of cached log-probabilities: raise it when they change
_FILES = tuple(f"{split}.npy" for split in SPLITS)
_REPORTS = tuple(f"{what}_{side}" for what in ("reward", "length") for side in ("chosen", "rejected"))


class DPO(Objective):
    """The mean over the pairs of a global batch; with sft_weight also the cross-entropy of the preferred answers.

    Reported beside it, as means over pairs: the rewards beta (pi - ref) of both answers, their margin, the share of
    pairs whose margin is above 0 (`reward_accuracy`), and the answers' lengths in tokens.

    counts_tokens: as CausalLM.
    """

    masks = True
    reports = ("reward_margin", "reward_accuracy", *_REPORTS)

    def __init__(
        self, beta: float = 0.1, loss: str = "sigmoid", label_smoothing: float = 0.0, sft_weight: float = 0.0,
        reference: str = "initial", counts_tokens: bool = False,
    ) -> None:
        self.beta, self.label_smoothing, self.sft_weight = beta, label_smoothing, sft_weight
        self.is_ipo, self.cached, self.counts_tokens = loss == "ipo", reference == "cached", counts_tokens
        self.parts = {"dpo_loss": 1.0, "sft_loss": sft_weight} if sft_weight else {"loss": 1.0}
        self.reports = (*(self.parts if sft_weight else ()), *DPO.reports)

    def samples(self, text: TokenisedText) -> Rows:
        return text.preferences()

    # --------------------------------------------------------------------------------------------------------- training

    def denominators(self, batch: Batch) -> Terms:
        counts_BP2 = per_answer(batch["labels"] != IGNORED, batch)
        n = (counts_BP2[..., 0] > 0).sum()
        named = dict.fromkeys(("loss", "dpo_loss", *self.reports), n) | {"sft_loss": counts_BP2[..., 0].sum()}
        return {**{name: named[name] for name in ("loss", *self.reports)}, "tokens": n_targets(batch["labels"])}

    def __call__(self, model: Callable[..., Any], batch: Batch, denominators: Terms) -> Terms:
        return self._terms(model, batch, denominators, self.label_smoothing)

    def plain(self, model: Callable[..., Any], batch: Batch, denominators: Terms) -> Terms:
        return self._terms(model, batch, denominators, 0.0)

    def reported(self, terms: Any) -> Any:
        return sum(weight * terms[name] for name, weight in self.parts.items())

    def _terms(
        self, model: Callable[..., Any], batch: Batch, denominators: Terms, label_smoothing: float
    ) -> Terms:
        reference_BP2 = self._reference(batch)
        lengths_BP2 = per_answer(batch["labels"] != IGNORED, batch)
        terms: Terms = {}

        def loss_of(head: Any, x_BTD: Tensor, embedding_VD: Tensor | None) -> Tensor:
            policy_BP2 = per_answer(head.log_probs(x_BTD, embedding_VD, batch["labels"]), batch)
            sums = self._sums(policy_BP2, reference_BP2, lengths_BP2, label_smoothing)
            terms.update({name: value / denominators[name] for name, value in sums.items()})
            total: Tensor = self.reported(terms)
            return total

        output = model(
            **self._given(batch), labels=batch["labels"], num_items_in_batch=denominators["tokens"],
            return_logits=False, loss_of=loss_of,
        )
        return {**{name: value.detach() for name, value in terms.items()}, "loss": output.loss}

    def _sums(
        self, policy_BP2: Tensor, reference_BP2: Tensor, lengths_BP2: Tensor, label_smoothing: float
    ) -> dict[str, Tensor]:
        """Each term's sum over the pairs, or over the preferred answers' tokens."""
        is_pair_BP = lengths_BP2[..., 0] > 0
        rewards_BP2 = self.beta * (policy_BP2 - reference_BP2)
        margin_BP = rewards_BP2[..., 0] - rewards_BP2[..., 1]
        if self.is_ipo:
            loss_BP = (margin_BP / self.beta - 1 / (2 * self.beta)).square()
        else:
            right, wrong = F.logsigmoid(margin_BP), F.logsigmoid(-margin_BP)
            loss_BP = -(1 - label_smoothing) * right - label_smoothing * wrong
        total = torch.where(is_pair_BP, loss_BP, 0.0).sum()
        values = (*rewards_BP2.sum((0, 1)).unbind(), *lengths_BP2.sum((0, 1)).to(total.dtype).unbind())
        found = {
            "reward_margin": margin_BP.sum(), "reward_accuracy": (margin_BP > 0).sum().to(total.dtype),
            **dict(zip(_REPORTS, values, strict=True)),
        }
        if not self.sft_weight:
            return {"loss": total, **found}
        return {"dpo_loss": total, "sft_loss": -policy_BP2[..., 0].sum(), **found}

    def _given(self, batch: Batch) -> dict[str, Any]:
        names = ("input_ids", "document_ids", *(["attention_mask"] if self.counts_tokens else []))
        return {name: batch[name] for name in names}

    # -------------------------------------------------------------------------------------------------------- reference

    def _reference(self, batch: Batch) -> Tensor:
        """Log-probabilities of the answers by the weights with which the run began, [B, P, 2]."""
        if self.cached:
            return batch["reference_log_probs"]
        return self.answers_by(self.models["reference"], batch)

    def begin(self, module: Any, data: Any) -> None:
        """With reference=cached: computes the log-probabilities of all pairs, or finds them in the cache of tokens."""
        if not self.cached:
            return
        if data is None:
            known = "initial with loaders of your own, whose rows are not known beforehand"
            raise ConfigError(f"`objective.reference` must be {known}, but is cached instead.")
        config, parallel, start = module.config, module.parallel, module.start
        seed = config.seed if start.model.state_dict().keys() - start.names else None  # some are only initialised
        weights = parallel.first(start.identity), repr(config.model), seed
        name = f"reference-{digest(FORMAT, data.fingerprint, *weights, config.trainer.precision)}"
        found = partial(find, config.data.cache_dir, name, _FILES)
        if parallel.any(found() is None):
            model = module.lay(start)
            computed = {split: self._computed(model, rows, module) for split, rows in data.rows.items()}
            del model

            def fill(empty: Path) -> None:
                for split, values in computed.items():
                    np.save(empty / f"{split}.npy", values)

            parallel.in_turn(lambda: cached(config.data.cache_dir, name, fill, _FILES))
        folder = found()
        assert folder is not None
        for split, rows in data.rows.items():
            rows.reference = folder / f"{split}.npy"

    @torch.no_grad()
    def _computed(self, model: Callable[..., Any], rows: PreferenceSamples, module: Any) -> NDArray[np.float32]:
        """Log-probabilities of both answers of each pair, [pairs, 2], by all ranks together."""
        parallel, size, n = module.parallel, module.config.micro_batch_size, len(rows)
        found = torch.zeros(rows.tokens.n_documents // 2, 2, device=module.device)
        for first in range(0, n, size * parallel.size):
            self.check()
            index = np.arange(first, first + size) + parallel.rank * size
            here = index[index < n]
            read = rows.batch(here if len(here) else index[:1] * 0)  # every rank makes the same number of forwards
            batch = {key: value.to(module.device) for key, value in read.items()}
            with module.trainer.precision_plugin.forward_context():
                values_BP2 = self.answers_by(model, batch)
            for pairs, values_P2 in zip(rows.pairs(here), values_BP2, strict=False):
                found[torch.from_numpy(pairs)] = values_P2[: len(pairs)].float()
        whole: NDArray[np.float32] = parallel.reduce({"found": found})["found"].cpu().numpy()
        return whole

    def answers_by(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """Log-probabilities of the answers by a model that is only read, [B, P, 2]."""
        labels = batch["labels"]
        out = model(**self._given(batch), labels=labels, return_logits=False, return_log_probs=True)
        return per_answer(out.log_probs, batch)

    # ------------------------------------------------------------------------------------------------------- validation

    def show(self, module: Any, data: Any, config: RunConfig, check: Callable[[], None]) -> list[Shown]:
        return answers(module, data, config, check)


def per_answer(values_BT: Tensor, batch: Batch) -> Tensor:
    """Sums over the tokens of each answer, [B, P, 2]; counts of a mask."""
    B, T = values_BT.shape
    values_BT = values_BT.long() if values_BT.dtype == torch.bool else values_BT
    n = 2 * pairs_of(T)
    sums = values_BT.new_zeros(B, n + 2).scatter_add(1, batch["document_ids"], values_BT)  # the last two: padding
    return sums[:, :n].reshape(B, -1, 2)

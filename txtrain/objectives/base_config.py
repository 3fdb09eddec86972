"""What every objective's config says: its keys, and what it is compatible with. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

from txtrain.registry import config, knob
from txtrain.run_config import RunConfig

Shapes = dict[str, tuple[int, ...]]


class Rollout(NamedTuple):
    """Completions of all ranks, sampled once for so many updates; forwards: for their log-probabilities afterwards."""

    n_prompts: int
    n_completions: int
    prompt_len: int
    max_new_tokens: int
    updates: int
    forwards: int


@config
class ObjectiveConfig:
    """Keys of an objective, and what it is compatible with (None: anything), as `config.compatibility` checks."""

    type: str

    topologies: ClassVar[tuple[str, ...] | None] = None
    heads: ClassVar[tuple[str, ...] | None] = None
    reads: ClassVar[tuple[str, ...] | None] = None  # kinds of data: text, pairs, images
    trains: ClassVar[bool] = True  # else it is for evaluation alone
    slides: ClassVar[bool] = False  # a window may slide over the text: each token is predicted from those before it
    alone: ClassVar[bool] = True  # `evaluate` measures it: it reads no further models
    smoothed = False  # labels are: the loss also reads the sum of the logits
    one_result: ClassVar[bool] = False  # for each sample, not for each token
    prefix_prompts: ClassVar[bool] = False  # a decoder learns to read what it continues from both sides

    @property
    def target_share(self) -> float:
        """Fraction of positions with a target, approximately; a head may skip the others."""
        return 1.0

    @property
    def models(self) -> Mapping[str, str]:
        """Further models that the objective reads: key that names each -> its path."""
        return {}

    @property
    def start(self) -> str | None:
        """The key of one more, which has the weights with which the run begins; None: there is none."""
        return None

    resets = False  # that model takes the weights that are trained from time to time; with an adapter it has one too
    prepares = False  # `txtrain prepare` also writes what its models find (`txtrain.training.teach`)
    same_tokenizer: ClassVar[bool] = False  # `models` must have the vocabulary of the trained one
    reads_start: ClassVar[bool] = False  # it needs those weights, if only before the first step (`LitModule.start`)

    @property
    def uncounted(self) -> str | None:
        """What `plan` cannot count of its memory; None: it can."""
        return None

    def arguments(self, config: RunConfig) -> dict[str, Any]:
        """Further arguments of the objective, as far as it has them, and values for keys that are null."""
        model = config.model
        return {"counts_tokens": model.counts_tokens, "two_stacks": model.topology == "encoder_decoder"}

    def rollout(self, config: RunConfig) -> Rollout | None:
        """What it samples; None: nothing."""
        return None

    def check(self) -> Iterator[str]:
        """Problems of the keys by themselves, apart from bounds."""
        yield from ()

    def check_with(self, config: RunConfig) -> Iterator[str]:
        """Problems of the keys with this model and data."""
        yield from ()

    def check_ranks(self, config: RunConfig, n: int) -> Iterator[str]:
        """Problems of the keys with n ranks that see different samples."""
        yield from ()

    def lengths(self, seq_len: int) -> tuple[int, int]:
        """Maximum tokens of a source and of its target, for an encoder-decoder."""
        return seq_len, seq_len

    def batch_shapes(self, config: RunConfig, n: int) -> Shapes:
        """Name -> shape of the tensors of n samples of maximum length; integers, but pixels are floats."""
        return self._text_shapes(config, n, *config.lengths)

    @staticmethod
    def _text_shapes(config: RunConfig, n: int, read: int, written: int | None) -> Shapes:
        shapes: Shapes = {"input_ids": (n, read), "labels": (n, written or read)}
        if not config.data.cross_document_attention:
            shapes |= {"document_ids": (n, read)} | ({"decoder_document_ids": (n, written)} if written else {})
        return shapes | ({} if config.data.packing == "concat" else {"attention_mask": (n, read)})  # padding


@config
class SmoothedConfig(ObjectiveConfig):
    """Objectives whose labels may be smoothed (1512.00567)."""

    label_smoothing: float = knob(0.0, at_least=0, below=1)  # in training, not in validation; 1706.03762: 0.1

    @property
    def smoothed(self) -> bool:  # type: ignore[override]
        return self.label_smoothing > 0

"""The objective group: keys of each option, and what it is compatible with. No torch."""

from __future__ import annotations

import dataclasses as dc
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from txtrain.errors import divisors_near
from txtrain.registry import BASES, knob, register
from txtrain.run_config import RunConfig

if TYPE_CHECKING:
    from txtrain.data.samples.taught import Taught

Score = Literal["exact_match", "bleu", "chrf"]
Shapes = dict[str, tuple[int, ...]]


@dc.dataclass(frozen=True, kw_only=True)
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

    prepares = False  # `txtrain prepare` also writes what its models find (`txtrain.training.teach`)
    same_tokenizer: ClassVar[bool] = False  # `models` must have the vocabulary of the trained one
    reads_start: ClassVar[bool] = False  # it needs those weights, if only before the first step (`LitModule.start`)

    def arguments(self, config: RunConfig) -> dict[str, Any]:
        """Further arguments of the objective, and values for keys that are null."""
        return {}

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


@dc.dataclass(frozen=True, kw_only=True)
class CausalLMConfig(ObjectiveConfig):
    topologies: ClassVar = ("decoder",)
    slides: ClassVar = True
    heads: ClassVar = ("lm",)
    reads: ClassVar[tuple[str, ...]] = ("text", "chat")

    # weight of the mean loss of multi-token prediction, with model.mtp_depth (2412.19437, section 4.2)
    mtp_weight: float = knob(0.3, at_least=0)

    def arguments(self, config: RunConfig) -> dict[str, Any]:
        return {"mtp_depth": config.model.mtp_depth, "counts_tokens": config.model.ffn.n_experts > 0}


@dc.dataclass(frozen=True, kw_only=True)
class SFTConfig(CausalLMConfig):
    """Next-token prediction of the assistant's turns, or of the answers to problems."""

    reads: ClassVar = ("chat", "problems")


@dc.dataclass(frozen=True, kw_only=True)
class MaskedLMConfig(ObjectiveConfig):
    """BERT's (1810.04805): of the chosen tokens mask_share become [MASK], random_share random tokens, others stay."""

    topologies: ClassVar = ("encoder",)
    heads: ClassVar = ("mlm", "lm")
    reads: ClassVar = ("text",)

    probability: float = knob(0.15, above=0, below=1)  # that a token is chosen to be predicted
    mask_share: float = knob(0.8, at_least=0, at_most=1)  # fraction of chosen tokens that become [MASK]
    random_share: float = knob(0.1, at_least=0, at_most=1)  # fraction that become a random token; the rest stay
    whole_word: bool = False  # choose all tokens of a word or none
    # samples are pairs of segments, with next-sentence prediction; null: if model/head has next_sentence
    next_sentence: bool | None = None

    @property
    def target_share(self) -> float:
        return self.probability

    def arguments(self, config: RunConfig) -> dict[str, Any]:
        return {"next_sentence": self.pairs(config.model.head), "segments": config.model.embedding.n_types > 0}

    def pairs(self, head: Any) -> bool:
        """Whether samples are pairs of segments, for a model with this head."""
        return bool(head.next_sentence) if self.next_sentence is None else self.next_sentence

    def batch_shapes(self, config: RunConfig, n: int) -> Shapes:
        if not self.pairs(config.model.head):
            return super().batch_shapes(config, n)
        names = ("input_ids", "token_type_ids", "attention_mask", "labels")
        return dict.fromkeys(names, (n, config.seq_len)) | {"next_sentence_label": (n,)}

    def check(self) -> Iterator[str]:
        mask, random = self.mask_share, self.random_share
        if mask + random > 1 + 1e-9:
            most = f"at most {1 - mask:.3g} beside mask_share={mask}"
            yield f"`objective.random_share` must be {most}, but is {random} instead."

    def check_with(self, config: RunConfig) -> Iterator[str]:
        head, embedding = config.model.head, config.model.embedding
        if not self.pairs(head):
            return
        if not head.next_sentence:
            yield (
                f"`objective.next_sentence` must be false or null with model/head={head.type}, which cannot tell "
                "whether sentences follow each other, but is true instead. Nearest: null."
            )
        if config.data.packing != "concat":
            yield f"`data.packing` must be concat for pairs of segments, but is {config.data.packing} instead."
        if config.seq_len < 8:
            yield (
                f"`data.seq_len` must be at least 8 for pairs of segments, but is {config.seq_len} instead. Nearest: 8."
            )
        if embedding.n_types not in (0, 2):
            yield (
                f"`model.embedding.n_types` must be 0 or 2 for pairs of segments, but is {embedding.n_types} instead. "
                "Nearest: 2."
            )


@dc.dataclass(frozen=True, kw_only=True)
class SpanCorruptionConfig(ObjectiveConfig):
    """T5's (1910.10683): sentinels replace spans of the input, and the target holds the spans."""

    topologies: ClassVar = ("encoder_decoder",)
    heads: ClassVar = ("lm",)
    reads: ClassVar = ("text",)

    density: float = knob(0.15, above=0, below=1)  # fraction of tokens that is dropped
    mean_length: float = knob(3.0, at_least=1)  # mean tokens per span
    n_sentinels: int = knob(100, at_least=1)  # <extra_id_0>, <extra_id_1>, ...; added to the tokenizer if missing

    def lengths(self, seq_len: int) -> tuple[int, int]:
        from txtrain.objectives.spans import Lengths

        fitting = Lengths.fitting(seq_len, self.density, self.mean_length)
        return (seq_len, seq_len) if fitting is None else (fitting.input_length, fitting.target_length)

    def check_with(self, config: RunConfig) -> Iterator[str]:
        from txtrain.objectives.spans import Lengths

        lengths = Lengths.fitting(config.seq_len, self.density, self.mean_length)
        if lengths is None:
            yield f"`data.seq_len` must be at least 4 for corrupted spans, but is {config.seq_len} instead. Nearest: 4."
        elif lengths.n_spans > self.n_sentinels:
            yield (
                f"`objective.n_sentinels` must be at least {lengths.n_spans}, the spans of a sequence of "
                f"{config.seq_len} tokens, but is {self.n_sentinels} instead. Nearest: {lengths.n_spans}."
            )


@dc.dataclass(frozen=True, kw_only=True)
class PrefixLMConfig(ObjectiveConfig):
    """The rest of a sequence after a prefix of random length with bidirectional attention (1801.10198; 1910.10683)."""

    topologies: ClassVar = ("decoder", "encoder_decoder")
    heads: ClassVar = ("lm",)
    reads: ClassVar = ("text",)

    def arguments(self, config: RunConfig) -> dict[str, Any]:
        return {"two_stacks": config.model.topology == "encoder_decoder"}

    def batch_shapes(self, config: RunConfig, n: int) -> Shapes:
        if config.model.topology != "encoder_decoder":
            return super().batch_shapes(config, n) | {"prefix_mask": (n, config.seq_len)}
        length = config.seq_len - 1
        return self._text_shapes(config, n, length, length) | {"attention_mask": (n, length)}

    def check_with(self, config: RunConfig) -> Iterator[str]:
        if config.seq_len < 3:
            yield (
                f"`data.seq_len` must be at least 3 for a prefix and its rest, but is {config.seq_len} instead. "
                "Nearest: 3."
            )


@dc.dataclass(frozen=True, kw_only=True)
class SmoothedConfig(ObjectiveConfig):
    """Objectives whose labels may be smoothed (1512.00567)."""

    label_smoothing: float = knob(0.0, at_least=0, below=1)  # in training, not in validation; 1706.03762: 0.1

    @property
    def smoothed(self) -> bool:  # type: ignore[override]
        return self.label_smoothing > 0


@dc.dataclass(frozen=True, kw_only=True)
class DPOConfig(ObjectiveConfig):
    """Direct preference optimisation (2305.18290), and IPO (2310.12036)."""

    topologies: ClassVar = ("decoder",)
    heads: ClassVar = ("lm",)
    reads: ClassVar = ("preferences",)
    alone: ClassVar = False

    beta: float = knob(0.1, above=0)  # how much a divergence from the reference costs; 2310.12036 calls it tau
    loss: Literal["sigmoid", "ipo"] = "sigmoid"  # sigmoid: DPO; ipo: a squared distance, which does not saturate
    # probability that a preference is the wrong way round (sigmoid alone), in training, not in validation
    label_smoothing: float = knob(0.0, at_least=0, below=0.5)
    # weight of the cross-entropy of the preferred answers, in nats per token (2404.19733, 2404.18922)
    sft_weight: float = knob(0.0, at_least=0)
    # of the weights with which the run begins: read at each step, or their log-probabilities, computed before the first
    reference: Literal["initial", "cached"] = "initial"

    reads_start: ClassVar = True

    @property
    def start(self) -> str | None:
        return "reference" if self.reference == "initial" else None

    def arguments(self, config: RunConfig) -> dict[str, Any]:
        return {"counts_tokens": config.model.ffn.n_experts > 0}

    def batch_shapes(self, config: RunConfig, n: int) -> Shapes:
        cached = {"reference_log_probs": (n, max(1, config.seq_len // 4), 2)} if self.reference == "cached" else {}
        return super().batch_shapes(config, n) | cached

    def check(self) -> Iterator[str]:
        if self.label_smoothing and self.loss == "ipo":
            given = self.label_smoothing
            yield f"`objective.label_smoothing` must be 0 with objective.loss=ipo, but is {given} instead. Nearest: 0."


@dc.dataclass(frozen=True, kw_only=True)
class DistillConfig(ObjectiveConfig):
    """Next-token prediction from a teacher's distribution (1503.02531), and from the tokens themselves."""

    topologies: ClassVar = ("decoder",)
    heads: ClassVar = ("lm",)
    reads: ClassVar = ("text", "chat")
    alone: ClassVar = False

    # as init_from, with the same tokenizer; null: its distributions are in the folder of `txtrain prepare` (top_k)
    teacher: str | None = knob(None, literal=True)
    # forward: KL(teacher || student), which covers all that the teacher may say; reverse: KL(student || teacher)
    kl: Literal["forward", "reverse"] = "forward"
    temperature: float = knob(1.0, above=0)  # of both models; the divergence is multiplied by its square
    hard_weight: float = knob(0.5, at_least=0, at_most=1)  # of the tokens' cross-entropy; the divergence has the rest
    # the teacher's so many likeliest tokens, and all others as one; null: each token of the vocabulary
    top_k: int | None = knob(None, at_least=1)

    same_tokenizer: ClassVar = True

    @property
    def models(self) -> Mapping[str, str]:
        return {} if self.teacher is None else {"teacher": self.teacher}

    def arguments(self, config: RunConfig) -> dict[str, Any]:
        offline = self.taught(config, "") if self.teacher is None else None
        counts = config.model.ffn.n_experts > 0
        return {"counts_tokens": counts, "offline": offline, "vocab_size": config.model.vocab_size}

    def taught(self, config: RunConfig, teacher: str) -> Taught:
        """What decides the distributions that `txtrain prepare` writes."""
        from txtrain.data.samples.taught import Taught

        assert self.top_k is not None
        data = config.data
        how = config.seq_len, data.packing, data.cross_document_attention
        return Taught(teacher, self.top_k, self.temperature, *how)

    @property
    def prepares(self) -> bool:  # type: ignore[override]
        return self.teacher is not None and self.top_k is not None

    def batch_shapes(self, config: RunConfig, n: int) -> Shapes:
        shapes = super().batch_shapes(config, n)
        if self.teacher is not None or self.top_k is None:
            return shapes
        shape = shapes["input_ids"]
        return shapes | {"teacher_ids": (*shape, self.top_k), "teacher_log_probs": (*shape, self.top_k + 1)}

    def check_with(self, config: RunConfig) -> Iterator[str]:
        if self.teacher is None and not config.data.also:
            yield "`objective.teacher` must be given: a Hugging Face folder, an export, a run or a checkpoint."
        elif self.teacher is None and self.top_k is None:
            yield "`objective.top_k` must be given without objective.teacher: the one of `txtrain prepare`."
        if self.top_k is not None and self.top_k > config.model.vocab_size:
            most = f"at most model.vocab_size ({config.model.vocab_size})"
            yield f"`objective.top_k` must be {most}, but is {self.top_k} instead. Nearest: {config.model.vocab_size}."
        if self.top_k is not None and config.strategy.cuts_activations:
            cut = f"null with strategy={config.strategy.type}, which cuts the vocabulary"
            yield f"`objective.top_k` must be {cut}, but is {self.top_k} instead."


@dc.dataclass(frozen=True, kw_only=True)
class Seq2SeqConfig(SmoothedConfig):
    """The target of a pair, given its source."""

    topologies: ClassVar = ("encoder_decoder",)
    heads: ClassVar = ("lm",)
    reads: ClassVar = ("pairs",)

    scores: tuple[Score, ...] | None = None  # metrics of decoded validation pairs; null: the data's default
    n_decoded: int = knob(256, at_least=0)  # pairs decoded at each validation
    num_beams: int = knob(1, at_least=1)  # beams of decoding; 1: greedy; 1706.03762: 4
    length_penalty: float = knob(0.6, at_least=0)  # with beams (1609.08144): higher values prefer longer answers

    def arguments(self, config: RunConfig) -> dict[str, Any]:
        return (
            {"scores": config.data.scores if self.scores is None else self.scores} if self.n_decoded else {"scores": ()}
        )

    def batch_shapes(self, config: RunConfig, n: int) -> Shapes:
        return dict.fromkeys(("input_ids", "attention_mask", "labels"), (n, config.seq_len))


@dc.dataclass(frozen=True, kw_only=True)
class ClassificationConfig(SmoothedConfig):
    """A class, several classes or numbers for each text (model.head.kind, which data.kind sets)."""

    heads: ClassVar = ("class",)
    reads: ClassVar = ("labels",)
    one_result: ClassVar = True

    # weight of the next tokens' mean loss, with model.head.lm=true (GPT-1: Radford et al. 2018, section 3.2)
    lm_weight: float = knob(0.5, at_least=0)

    def arguments(self, config: RunConfig) -> dict[str, Any]:
        head = config.model.head
        return {"kind": head.kind, "lm": head.lm, "marks": config.model.topology == "encoder"}

    def batch_shapes(self, config: RunConfig, n: int) -> Shapes:
        names = ["input_ids", "attention_mask", *(["token_type_ids"] if config.model.embedding.n_types else [])]
        head = config.model.head
        one = head.kind == "single" or (head.kind == "regression" and head.n_outputs == 1)
        return dict.fromkeys(names, (n, config.seq_len)) | {"labels": (n,) if one else (n, head.n_outputs)}

    def check_with(self, config: RunConfig) -> Iterator[str]:
        if self.label_smoothing and config.data.kind != "single":
            told = f"0 with data.kind={config.data.kind}, but is {self.label_smoothing} instead"
            yield f"`objective.label_smoothing` must be {told}. Nearest: 0."


@dc.dataclass(frozen=True, kw_only=True)
class QuestionsConfig(ObjectiveConfig):
    topologies: ClassVar = ("decoder", "encoder_decoder")
    heads: ClassVar = ("lm",)
    trains: ClassVar = False

    def arguments(self, config: RunConfig) -> dict[str, Any]:
        return {"two_stacks": config.model.topology == "encoder_decoder"}


@dc.dataclass(frozen=True, kw_only=True)
class MultipleChoiceConfig(QuestionsConfig):
    """The likeliest of several choices; for evaluate."""

    reads: ClassVar = ("choices",)


@dc.dataclass(frozen=True, kw_only=True)
class ClozeConfig(QuestionsConfig):
    """The end of a text; for evaluate."""

    reads: ClassVar[tuple[str, ...]] = ("cloze",)


@dc.dataclass(frozen=True, kw_only=True)
class AnswersConfig(QuestionsConfig):
    """Answers to questions, generated greedily; for evaluate."""

    reads: ClassVar = ("questions",)

    max_new_tokens: int = knob(64, at_least=1)
    stop: tuple[str, ...] = ("\n",)  # texts that end an answer
    # regular expression: of both texts its last match, or the match of its first group, is compared; null: all
    pattern: str | None = knob(None, literal=True)
    ignore_case: bool = False

    def check(self) -> Iterator[str]:
        try:
            re.compile(self.pattern or "")
        except re.error as e:
            yield f"`objective.pattern` must be a regular expression, but is {self.pattern!r} instead: {e}."


@dc.dataclass(frozen=True, kw_only=True)
class ImageClassificationConfig(SmoothedConfig):
    """The class of an image."""

    one_result: ClassVar = True

    topologies: ClassVar = ("encoder",)
    heads: ClassVar = ("class",)
    reads: ClassVar = ("images",)

    def batch_shapes(self, config: RunConfig, n: int) -> Shapes:
        e = config.model.embedding
        return {"pixel_values": (n, e.n_channels, e.image_size, e.image_size), "labels": (n,)}


@dc.dataclass(frozen=True, kw_only=True)
class GRPOConfig(ObjectiveConfig):
    """Group relative policy optimisation (2402.03300, 2501.12948), its variants, and REINFORCE and RLOO.

    DAPO (2503.14476): normalise=token, clip_high=0.28, beta=0. Dr. GRPO (2503.20783): normalise=constant,
    divide_by_std=false. GSPO (2507.18071): ratio=sequence, clip_low=3e-4, clip_high=4e-4. CISPO (2506.13585):
    loss=cispo, normalise=token.
    """

    topologies: ClassVar = ("decoder",)
    heads: ClassVar = ("lm",)
    reads: ClassVar = ("problems",)
    alone: ClassVar = False

    group_size: int = knob(8, at_least=2)  # completions of each prompt
    prompts_per_rollout: int | None = knob(None, at_least=1)  # null: data.global_batch_size / group_size
    # optimizer updates on one rollout's completions, each on data.global_batch_size of them, in turn
    updates_per_rollout: int = knob(1, at_least=1)
    max_new_tokens: int = knob(16, at_least=1)  # of a completion; prompts have the rest of data.seq_len
    temperature: float = knob(1.0, above=0)
    top_p: float = knob(1.0, above=0, at_most=1)
    # weight of the KL divergence from the reference (k3, 2402.03300, equation 4); 0: no reference is read
    beta: float = knob(0.04, at_least=0)
    # as init_from; null: the weights with which the run begins
    reference: str | None = knob(None, literal=True)
    # loss: of each token; reward: the sum over a completion's tokens is taken off its reward (2203.02155)
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

    @property
    def models(self) -> Mapping[str, str]:
        return {} if self.reference is None else {"reference": self.reference}

    @property
    def start(self) -> str | None:
        return "reference" if self.beta and self.reference is None else None

    @property
    def reads_start(self) -> bool:  # type: ignore[override]
        return self.start is not None

    def prompts(self, config: RunConfig) -> int:
        return self.prompts_per_rollout or max(1, config.data.global_batch_size // self.group_size)

    def arguments(self, config: RunConfig) -> dict[str, Any]:
        has_ratio = self.loss in ("grpo", "cispo")
        return {
            "prompts_per_rollout": self.prompts(config), "reward": config.reward, "seed": config.seed,
            "divide_by_std": has_ratio if self.divide_by_std is None else self.divide_by_std,
            "counts_tokens": config.model.ffn.n_experts > 0,
        }

    def lengths(self, seq_len: int) -> tuple[int, int]:
        return seq_len - self.max_new_tokens, self.max_new_tokens

    def batch_shapes(self, config: RunConfig, n: int) -> Shapes:
        of_tokens = ("input_ids", "labels", "old_log_probs", *(("reference_log_probs",) if self.beta else ()))
        mask = {"attention_mask": (n, config.seq_len)} if config.model.ffn.n_experts else {}
        return dict.fromkeys(of_tokens, (n, config.seq_len)) | mask | {"advantages": (n,)}

    def check(self) -> Iterator[str]:
        if not self.beta and self.reference is not None:
            yield f"`objective.reference` must be null with objective.beta=0, but is {self.reference} instead."
        if self.loss in ("reinforce", "rloo"):
            if self.updates_per_rollout > 1:
                yield (
                    f"`objective.updates_per_rollout` must be 1 with objective.loss={self.loss}, which has no ratio "
                    f"for weights that have moved on, but is {self.updates_per_rollout} instead. Nearest: 1."
                )
            if self.ratio != "token":
                yield f"`objective.ratio` must be token with objective.loss={self.loss}, but is {self.ratio} instead."

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
        for key in dropouts(config.model, "model"):
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


for name, target, config in (
    ("causal_lm", "causal_lm:CausalLM", CausalLMConfig),
    ("sft", "sft:SFT", SFTConfig),
    ("grpo", "grpo:GRPO", GRPOConfig),
    ("dpo", "dpo:DPO", DPOConfig),
    ("distill", "distill:Distill", DistillConfig),
    ("masked_lm", "masked_lm:MaskedLM", MaskedLMConfig),
    ("span_corruption", "span_corruption:SpanCorruption", SpanCorruptionConfig),
    ("prefix_lm", "prefix_lm:PrefixLM", PrefixLMConfig),
    ("seq2seq", "seq2seq:Seq2Seq", Seq2SeqConfig),
    ("classification", "classification:Classification", ClassificationConfig),
    ("multiple_choice", "questions:MultipleChoice", MultipleChoiceConfig),
    ("cloze", "questions:Cloze", ClozeConfig),
    ("answers", "questions:Answers", AnswersConfig),
    ("image_classification", "image_classification:ImageClassification", ImageClassificationConfig),
):
    register("objective", name, f"txtrain.objectives.{target}", config)

BASES["objective"] = ObjectiveConfig


@dc.dataclass(frozen=True, kw_only=True)
class RewardOption:
    """A row of the registry; the keys of our own rewards are those of `run_config.RewardConfig`."""

    type: str


for name in ("Answer", "Format", "Length", "Regex"):
    register("reward", name.lower(), f"txtrain.objectives.rewards:{name}", RewardOption)

BASES["reward"] = RewardOption

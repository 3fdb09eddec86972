"""The objective group: keys of each option, and what it is compatible with. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from txtrain.objectives.base_config import ObjectiveConfig, Shapes, SmoothedConfig
from txtrain.objectives.distill_config import DistillConfig
from txtrain.objectives.dpo_config import DPOConfig
from txtrain.objectives.grpo_config import GRPOConfig
from txtrain.objectives.questions_config import AnswersConfig, ClozeConfig, MultipleChoiceConfig
from txtrain.registry import BASES, config, knob, register
from txtrain.run_config import RunConfig

Score = Literal["exact_match", "bleu", "chrf"]


@config
class CausalLMConfig(ObjectiveConfig):
    topologies: ClassVar = ("decoder",)
    slides: ClassVar = True
    heads: ClassVar = ("lm",)
    reads: ClassVar[tuple[str, ...]] = ("text", "chat")

    # weight of the mean loss of multi-token prediction, with model.mtp_depth (2412.19437, section 4.2)
    mtp_weight: float = knob(0.3, at_least=0)

    def arguments(self, config: RunConfig) -> dict[str, Any]:
        return super().arguments(config) | {"mtp_depth": config.model.mtp_depth}


@config
class SFTConfig(CausalLMConfig):
    """Next-token prediction of the assistant's turns, or of the answers to problems."""

    reads: ClassVar = ("chat", "problems")


@config
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


@config
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


@config
class PrefixLMConfig(ObjectiveConfig):
    """The rest of a sequence after a prefix of random length with bidirectional attention (1801.10198; 1910.10683)."""

    topologies: ClassVar = ("decoder", "encoder_decoder")
    heads: ClassVar = ("lm",)
    reads: ClassVar = ("text",)
    prefix_prompts: ClassVar = True

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


@config
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


@config
class ClassificationConfig(SmoothedConfig):
    """A class, several classes or numbers for each text (model.head.kind, which data.kind sets)."""

    heads: ClassVar = ("class",)
    reads: ClassVar = ("labels",)
    one_result: ClassVar = True

    # weight of the next tokens' mean loss, with model.head.lm=true (GPT-1: Radford et al. 2018, section 3.2)
    lm_weight: float = knob(0.5, at_least=0)

    def arguments(self, config: RunConfig) -> dict[str, Any]:
        head = config.model.head
        is_encoder = config.model.topology == "encoder"
        return super().arguments(config) | {"kind": head.kind, "lm": head.lm, "marks": is_encoder}

    def batch_shapes(self, config: RunConfig, n: int) -> Shapes:
        names = ["input_ids", "attention_mask", *(["token_type_ids"] if config.model.embedding.n_types else [])]
        head = config.model.head
        one = head.kind == "single" or (head.kind == "regression" and head.n_outputs == 1)
        return dict.fromkeys(names, (n, config.seq_len)) | {"labels": (n,) if one else (n, head.n_outputs)}

    def check_with(self, config: RunConfig) -> Iterator[str]:
        if self.label_smoothing and config.data.kind != "single":
            told = f"0 with data.kind={config.data.kind}, but is {self.label_smoothing} instead"
            yield f"`objective.label_smoothing` must be {told}. Nearest: 0."


@config
class ImageClassificationConfig(SmoothedConfig):
    """The class of an image."""

    one_result: ClassVar = True

    topologies: ClassVar = ("encoder",)
    heads: ClassVar = ("class",)
    reads: ClassVar = ("images",)

    def batch_shapes(self, config: RunConfig, n: int) -> Shapes:
        e = config.model.embedding
        return {"pixel_values": (n, e.n_channels, e.image_size, e.image_size), "labels": (n,)}


for name, target, cls in (
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
    register("objective", name, f"txtrain.objectives.{target}", cls)

BASES["objective"] = ObjectiveConfig


@config
class RewardOption:
    """A row of the registry; the keys of our own rewards are those of `run_config.RewardConfig`."""

    type: str


for name in ("Answer", "Format", "Length", "Regex"):
    register("reward", name.lower(), f"txtrain.objectives.rewards:{name}", RewardOption)

BASES["reward"] = RewardOption

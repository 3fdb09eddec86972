"""Problems as samples: the prompt as tokens, and the whole problem as text beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from txtrain.data.chat.template import Template
from txtrain.data.samples.draws import Draws
from txtrain.data.samples.order import Indices
from txtrain.data.samples.rows import Rows, mask_of, padded
from txtrain.data.sources.source import SPLITS, Problem, ProblemSource, Split, hashed, identity
from txtrain.data.store.split import digest
from txtrain.data.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class ProblemCorpus:
    """The texts of a source's problems, for a tokenizer that is trained on them."""

    source: ProblemSource

    def documents(self) -> Iterator[tuple[Split, str]]:
        for split in SPLITS:
            for problem in self.source.problems(split):
                yield split, f"{problem['question']} {problem.get('demonstration', problem['answer'])}"

    def training_texts(self) -> Iterator[str]:
        return (text for split, text in self.documents() if split == "train")

    @cached_property
    def fingerprint(self) -> str:
        return digest("problems", identity(self.source, lambda: hashed(self.documents())))


class PromptSamples(Rows):
    """Row i is the i-th problem of at most `longest` tokens.

    The prompt is the question after a tokenizer's beginning token, or what the tokenizer's chat template makes of it
    as a user's turn, up to where the assistant answers.

    answered: the problem's `demonstration` (else its answer) and the end token follow the prompt, to be trained.
    """

    def __init__(self, problems: Sequence[Problem], tokenizer: Tokenizer, longest: int, answered: bool = False) -> None:
        texts, ids = _prompts([problem["question"] for problem in problems], tokenizer)
        shown = [str(problem.get("demonstration", problem["answer"])) for problem in problems] if answered else []
        answers = [[*answer, tokenizer.eos_id] for answer in tokenizer.encode_batch(shown)]
        trained = [[*[-100] * len(row), *answer] for row, answer in zip(ids, answers, strict=False)]
        ids = [[*row, *answer] for row, answer in zip(ids, answers, strict=True)] if answered else ids
        self.pad_id = tokenizer.padding_id
        self.n_all = len(problems)
        self.kept = np.array([i for i, row in enumerate(ids) if len(row) <= longest], dtype=np.int64)
        self.ids = [ids[i] for i in self.kept]
        self.labels = [trained[i] for i in self.kept] if answered else [[-100] * len(row) for row in self.ids]
        self.texts = [
            np.frombuffer(json.dumps({**problems[i], "prompt": texts[i]}).encode(), np.uint8) for i in self.kept
        ]

    def __len__(self) -> int:
        return len(self.kept)

    def sources(self, rows: Indices) -> list[list[int]]:
        return [[number] for number in self.kept[rows].tolist()]

    def batch(self, rows: Indices, draws: Draws | None = None) -> dict[str, Tensor]:
        """input_ids, attention_mask, labels (-100 in prompts), [B, T], right-padded; `problem`, see `problem_of`."""
        ids = [self.ids[row] for row in rows]
        input_ids, mask = padded(ids, self.pad_id), mask_of(ids)
        return {
            "input_ids": input_ids,
            "attention_mask": mask,
            "labels": padded([self.labels[row] for row in rows], -100),
            "problem": padded([self.texts[row] for row in rows], 0, dtype=np.uint8),
        }


def problem_of(text_L: Tensor) -> dict[str, Any]:
    """The problem in a row of a batch's `problem`, uint8 [L]: JSON in UTF-8, then zeros; `prompt` beside its keys."""
    problem: dict[str, Any] = json.loads(bytes(text_L.cpu().numpy().tobytes()).rstrip(b"\0"))
    return problem


def _prompts(questions: Sequence[str], tokenizer: Tokenizer) -> tuple[list[str], list[list[int]]]:
    if tokenizer.chat_template is None:
        begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        return [*questions], [[*begin, *ids] for ids in tokenizer.encode_batch(questions)]
    with Template(tokenizer) as template:
        texts = [template.prompt([{"role": "user", "content": question}]) for question in questions]
    return texts, [tokenizer.as_written(text).ids for text in texts]

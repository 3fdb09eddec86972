"""The verbs, one row each. A new one is a row, and a module with its configuration and its function."""

from __future__ import annotations

import dataclasses as dc
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from txtrain.errors import ConfigError, RunError, denied
from txtrain.parallel.early_signals import EndsAtOnce
from txtrain.registry import imported

if TYPE_CHECKING:
    from txtrain.config.composed import Composed

START = time.time()  # before the slow imports
Work = Callable[[], int]  # returns the exit code


HEAD = "txtrain [VERB] [KEY=VALUE ...]          train any transformer by composing its parts\n\nVerbs\n"
FLAGS = """\
Flags, anywhere on the line
  -m, --multirun             run every combination of the comma-separated values
  -c, --cfg job|hydra|all    print the configuration and stop; --resolve: with Hydra's own references filled in
  -cd, --config-dir DIR      your own options and recipes beside the packaged ones
  -h, --help                 this text; txtrain VERB --help: its keys; txtrain --help GROUP or KEY: what it stands for
"""
ENDS = """
`txtrain train --help` lists the keys; `txtrain ... --cfg job` prints every value that a run would use.
Exit codes: 0 done, 1 failed, 2 a mistake on the command line, 75 preempted after a complete checkpoint.
TXTRAIN_DEBUG=1 shows tracebacks.
"""


class Verb(NamedTuple):
    """A row. config: the frozen dataclass of its keys, `imports` among them; needs no torch. run: a function from
    the composed job to the exit code. Both are "module:name", imported when needed. examples: shown below its help."""

    help: str
    config: str
    run: str
    examples: str


_SCHEMA, _OF_TRAINED = "txtrain.config.schema:", "txtrain.config.schema_of_trained:"
VERBS = {
    "train": Verb(
        "pretrain a model (the default); `txtrain` alone is model=gpt2 data=wikitext",
        _SCHEMA + "Train",
        "txtrain.cli.train:run_train",
        """\
  txtrain model=mistral data=wikitext
  txtrain model=gpt2 model.norm_position=post model/position=rope model/ffn=swiglu
  txtrain -m model=gpt2 model.norm_position=pre,post,sandwich
  txtrain resume=runs/mistral-wikitext/2026-12-01_12-00-00 trainer.max_steps=1200
""",
    ),
    "generate": Verb(
        "continue prompts with a trained model",
        _OF_TRAINED + "Generate",
        "txtrain.cli.generate:run_generate",
        '  txtrain generate checkpoint=RUN prompt="Once upon a time, " temperature=0\n',
    ),
    "evaluate": Verb(
        "loss, perplexity, bits per byte, accuracy and the like of a trained model on data, with intervals",
        _OF_TRAINED + "Evaluate",
        "txtrain.cli.evaluate:run_evaluate",
        "  txtrain evaluate checkpoint=RUN data=text data.path=FILES stride=128 out=evaluation.json\n",
    ),
    "predict": Verb(
        "labels, texts, log-probabilities or embeddings of each row of a file, into out=FILE.jsonl",
        _OF_TRAINED + "Predict",
        "txtrain.cli.predict:run_predict",
        "  txtrain predict checkpoint=RUN data=text data.path=ROWS.jsonl out=predictions.jsonl\n",
    ),
    "export": Verb(
        "write a checkpoint as a folder of Hugging Face: config.json, model.safetensors, tokenizer",
        _OF_TRAINED + "Export",
        "txtrain.cli.export:run_export",
        "  txtrain export checkpoint=RUN out=DIR\n  txtrain export checkpoint=RUN out=DIR merge_adapter=false\n",
    ),
    "plan": Verb(
        "parameters, FLOPs, cache, steps, time and memory of what train would run, without building it",
        "txtrain.config.schema_of_plan:Plan",
        "txtrain.cli.plan:run_plan",
        "  txtrain plan model=mistral_7b plan.device=H100 plan.n_devices=64 trainer.precision=bf16-mixed\n",
    ),
    "prepare": Verb(
        "tokenise what train would read ahead of time: data=memmap data.path=DIR trains on the same samples",
        _SCHEMA + "Prepare",
        "txtrain.cli.prepare:run_prepare",
        "  txtrain prepare data=text data.path=FILES out=DIR\n",
    ),
    "preview": Verb(
        "show the first samples of train as the model will see them, trained tokens in colour",
        _SCHEMA + "Preview",
        "txtrain.cli.preview:run_preview",
        "  txtrain preview data=text data.path=FILES preview.n=5\n",
    ),
}


def overview() -> str:
    """What `txtrain --help` prints; imports nothing."""
    verbs = "".join(f"  {name:<10} {row.help}\n" for name, row in VERBS.items())
    return HEAD + verbs + "\nExamples\n" + "".join(row.examples for row in VERBS.values()) + "\n" + FLAGS + ENDS


def root_of(verb: str) -> type:
    """The class of a verb's configuration."""
    found: type = imported(VERBS[verb].config)
    return found


def work_of(verb: str, job: Composed, start: float = START) -> Work:
    """The function that runs the job, imported. start: of the process, in seconds of the system's clock."""
    from txtrain.ground import files  # help needs none of what it imports

    if said := files.check_temporary():
        print(f"txtrain: {said}", file=sys.stderr)
    return partial(imported(VERBS[verb].run), dc.replace(job, start=start))


def exit_code(prepare: Callable[[], Work]) -> int:
    """Prepare the work and do it.

    Returns:
        0 done, 1 a failure (or an exception), 2 the user's mistake, 75 preempted after a complete checkpoint.
    """
    try:
        try:
            with EndsAtOnce():
                work = prepare()
            return work()
        except PermissionError as e:  # asked of a path before it is opened, too
            raise ConfigError(denied(e)) from e
    except ConfigError as e:
        if os.environ.get("TXTRAIN_DEBUG") == "1":
            import traceback

            traceback.print_exc()
        for problem in e.problems:  # none if another rank reports them
            print(f"txtrain: {problem}", file=sys.stderr)
        return 1 if isinstance(e, RunError) else 2
    except KeyboardInterrupt:  # a run that has begun handles it itself, with a checkpoint
        print("\ntxtrain: interrupted.", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `| head`: nothing may be flushed at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1

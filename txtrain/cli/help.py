"""What `--help` prints. Names of options are read from the files; nothing heavy is imported."""

from __future__ import annotations

import re
import textwrap

from txtrain.config import paths
from txtrain.config.hardware import PUBLISHED
from txtrain.registry import MODEL_AXES

FLAGS = """\
  -m, --multirun             run every combination of the comma-separated values
  -c, --cfg job|hydra|all    print the configuration and stop; --resolve: with Hydra's own references filled in
  -cd, --config-dir DIR      your own options and recipes beside the packaged ones
  -h, --help                 this text; txtrain VERB --help for the keys of a verb
"""

OVERVIEW = f"""\
txtrain [VERB] [KEY=VALUE ...]          train any transformer by composing its parts

Verbs
  train      pretrain a model (the default); `txtrain` alone is model=gpt2 data=wikitext
  generate   continue prompts with a trained model
  plan       parameters, FLOPs, cache, steps and time of what train would run, without building it
  prepare    tokenise ahead of time, for data=memmap
  preview    samples as the model will see them, trained tokens in colour
  export     a checkpoint as a folder of Hugging Face

Examples
  txtrain model=mistral data=wikitext
  txtrain model=gpt2 model.norm_position=post model/position=rope model/ffn=swiglu
  txtrain -m model=gpt2 model.norm_position=pre,post,sandwich
  txtrain resume=runs/mistral-wikitext/2026-12-01_12-00-00 trainer.max_steps=1200
  txtrain generate checkpoint=RUN prompt="Once upon a time, " temperature=0
  txtrain plan model=mistral_7b plan.device=H100 plan.n_devices=64 trainer.precision=bf16-mixed

Flags, anywhere on the line
{FLAGS}
`txtrain train --help` lists the keys; `txtrain ... --cfg job` prints every value that a run would use.
Exit codes: 0 done, 1 failed, 2 a mistake on the command line, 75 preempted after a complete checkpoint. TXTRAIN_DEBUG=1 shows tracebacks.
"""

TRAIN = """\
txtrain [train] [KEY=VALUE ...]

Model: one option an axis; a swap keeps what is not part of the old mechanism and says what it drops
  model=NAME                       {models}
  model/attention=NAME             {attention}
  model/ffn=NAME                   {ffn}
  model/position=NAME              {position}
  model/norm=NAME                  {norm}
  model.norm_position=NAME         pre, post, inner, sandwich
  model.n_layers, dim, n_heads     size; also vocab_size, max_seq_len, dropout, tie_word_embeddings, logit_softcap
  model.attention.KEY              n_kv_heads, head_dim, window (4096, or a pattern over layers: [4096,null]), softcap, scale, qk_norm, bias
  model.ffn.KEY                    hidden_dim (null: the usual ratio), activation, bias
  model.position.KEY               of rope: theta, scaling ({{rope_type: yarn, factor: 4, original_max_seq_len: 4096}}); others have their own

Data
  data=NAME                        {data}
  data.path, data.val_path         files, folders or globs, several with commas: a.txt,b.txt
                                   of data=hf what load_dataset takes, with data.name, split, text_column
  data.sources, data.weights       of data=mixture: data.sources.NAME.type=text data.sources.NAME.path=... data.weights={{NAME:0.7,...}}
  data.tokenizer                   train (a BPE of model.vocab_size), bytes, or a folder, file or hub name
  data.seq_len                     tokens a sequence; null: model.max_seq_len
  data.packing                     concat (documents are cut where a sequence ends), best_fit (whole documents, and padding)
  data.global_batch_size           sequences a step, over all processes
  data.micro_batch_size            sequences a process at a time; accumulation is derived

Training: every interval counts steps, a step is one update
  objective=NAME                   {objective}
  optimizer=NAME                   {optimizer}; optimizer.lr, weight_decay, betas, no_decay,
                                   groups=[{{pattern: embedding, lr_scale: 0.1, weight_decay: 0.0}}]: of several that match the last holds
  scheduler=NAME                   {scheduler}; scheduler.warmup_steps, min_lr_ratio
  ema.decay                        null: no average of the weights; also every_n_steps, validate
  strategy=NAME                    {strategy}
                                   strategy.dp_replicate_size, tp_size, ep_size, cpu_offload, reshard_after_forward, where the option has them
  trainer.devices, num_nodes       processes on each node (auto: one a GPU, or one), and nodes; docs/distributed.md
  trainer.activation_checkpointing none, full, selective, or n: every n-th block is computed again in the backward
  trainer.max_steps                or max_epochs, max_tokens, max_time=DD:HH:MM:SS: the first that is reached ends the run
  trainer.val_check_interval       steps between validations; limit_val_batches: of so many batches
  trainer.precision                32-true, bf16-mixed, bf16-true
  trainer.KEY                      gradient_clip_val, log_every_n_steps, accelerator, compile, deterministic, max_skipped_steps
                                   fast_dev_run, overfit_batches, max_divergent_steps (null: a run that diverges is told of, not ended)
  trainer.auto_requeue=true        in a SLURM job: on SIGUSR1, SIGTERM, or before the job's end, save and have SLURM run the job again
  save.every_n_steps               also keep_last, keep_best, keep_every_n_steps; save.async=true writes while training goes on
  sample.KEY                       continuations at each validation: prompts, n, max_new_tokens, temperature
  logger=NAME                      {logger}, or a list; metrics.csv is always written
  logger.KEY                       of wandb: project, entity, group, tags, log_model (true: the last checkpoint, all), mode (online, offline);
                                   x_axis=step, tokens. WANDB_* variables win; docs/logging.md
  layer_stats.every_n_steps        gradient and weight norms of each layer in every so many steps' rows; layer_stats.activations=true: and outputs

Run
  recipe=NAME                      {recipes}
  name, run_dir, seed              the run's folder is run_dir, or runs/<name>/<date>_<time>
  init_from=DIR                    start from the weights of a Hugging Face folder, an export, a run or a checkpoint
                                   (here, in resume= and in fork= runs/NAME, a folder of runs, is the newest of them)
  resume=auto|never|RUN            auto: go on from the newest checkpoint of run_dir; RUN: a folder or a checkpoint, key=value on top
  resume_allow=[KEY, ...]          what may differ from the run that is continued
  fork=CHECKPOINT                  a run of its own from another's weights, optimizer state and step
  imports=[mine.py]                your own parts, registered by @txtrain.component
  -m hydra/launcher=slurm          a sweep as one array of a cluster: hydra.launcher.partition, timeout_min, gpus_per_node, ...; slurm/README.md
  verbosity=quiet|normal|verbose   of what is printed; also NO_COLOR=1
  profile=true                     a trace of steps 4 to 6, or of profile_steps=[FIRST,LAST], into the run's folder

Flags
{flags}"""

EXPORT = """\
txtrain export checkpoint=RUN out=DIR

  checkpoint=PATH                  a run's folder (its newest checkpoint), one checkpoint, or runs/NAME (its newest run)
  weights=model                    ema: the averaged weights of a run with ema.decay
  out=DIR                          a new folder: config.json, model.safetensors, tokenizer; the class is the one that equals the model
  imports=[mine.py]                the user's own parts that the run was made with

Flags
{flags}"""

PLAN = """\
txtrain plan [KEY=VALUE ...]      what `txtrain train` with the same keys would run, counted; nothing is built, no data is read

  plan.device=NAME                 {devices}: its published peak at trainer.precision
  plan.peak_flops=NUMBER           FLOP/s of another device
  plan.n_devices=null              as many of them (null: trainer.devices * trainer.num_nodes)
  plan.memory=null                 of one device, such as 80GB: exit code 2 if a step does not fit
  plan.simulate=false              also watch the real model take a step without storage
  plan.mfu=0.4                     share of the peak that the run reaches
  plan.cache_dtype=bfloat16        of the key-value cache: bfloat16, float32
  plan.format=text                 text, json
  Every key of train: txtrain train --help

Flags
{flags}"""

PREPARE = """\
txtrain prepare data=... out=DIR [KEY=VALUE ...]      what `txtrain train` with the same keys would tokenise, in files that
                                 `txtrain data=memmap data.path=DIR` trains on: the same samples in the same order

  out=DIR                          a new folder, or one of the same command that was stopped: it goes on where it stood
  prepare.shard_tokens=100000000   a file ends with the document that fills it so far
  data, data.tokenizer             what is read, and by which tokenizer; model.vocab_size and objective say what a trained one needs
  Every key of train: txtrain train --help

Flags
{flags}"""

PREVIEW = """\
txtrain preview data=... [KEY=VALUE ...]      the first samples of `txtrain train` with the same keys, as the model will see them

  preview.n=3                      so many
  preview.split=train              train, validation
  Every key of train: txtrain train --help. NO_COLOR=1: trained tokens stand between marks instead

Flags
{flags}"""

GENERATE = """\
txtrain generate checkpoint=RUN prompt="..." [KEY=VALUE ...]

  checkpoint=PATH                  a run's folder (its newest checkpoint), one checkpoint, runs/NAME (its newest run),
                                   or a Hugging Face folder
  weights=model                    ema: the averaged weights of a run with ema.decay
  prompt=TEXT                      taken as typed; `-` reads standard input
  prompt_file=FILE                 one prompt a line
  max_new_tokens=64                tokens to add at most
  temperature=0.8                  0: always the most likely token
  top_k, top_p, min_p              null: off
  seed=0                           of the draws
  stream=true                      print tokens as they come, for one prompt
  accelerator=auto                 auto, cpu, gpu
  imports=[mine.py]                the user's own parts that the run was made with

Flags
{flags}"""


def usage(verb: str | None) -> str:
    """The help of a verb, or of the program."""
    if verb is None:
        return OVERVIEW
    if verb == "export":
        return EXPORT.format(flags=FLAGS)
    if verb == "generate":
        return GENERATE.format(flags=FLAGS)
    if verb in ("prepare", "preview"):
        return {"prepare": PREPARE, "preview": PREVIEW}[verb].format(flags=FLAGS)
    if verb == "plan":
        return PLAN.format(flags=FLAGS, devices=", ".join(PUBLISHED))
    groups = {axis: f"model/{axis}" for axis in MODEL_AXES} | {g: g for g in ["data", "objective", "optimizer", "scheduler", "strategy", "logger", "recipes"]}
    options = {name: ", ".join(paths.options(group)) or "none yet" for name, group in groups.items()}
    options["recipes"] = f"\n{'':35}".join(textwrap.wrap(options["recipes"], 110))
    return TRAIN.format(models=_models(), flags=FLAGS, **options)


def _models() -> str:
    """Each family, and its published sizes in the order in which its file gives them."""
    published = {}
    for name in paths.options("model"):
        text = (paths.CONF / "model" / f"{name}.yaml").read_text(encoding="utf-8")
        if found := re.search(r"^published: \{(.*)\}", text, re.MULTILINE):
            published[name] = re.findall(r"(\w+):", found[1])
    sizes = "\n".join(f"{'':35}{', '.join(names)}" for names in published.values())
    return f"{', '.join(published)} (laptop size), or as published:\n{sizes}"

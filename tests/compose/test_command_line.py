"""Verbs, flags, spellings, mistakes: one helpful message, exit code 2, nothing written."""

import dataclasses as dc
import errno
import gc
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import txtrain
from txtrain import compose
from txtrain.cli import main as command_line
from txtrain.cli.help import _options as said_of_options
from txtrain.cli.help import usage
from txtrain.cli.jobs import compose_job
from txtrain.cli.main import main
from txtrain.cli.verbs import VERBS, Verb, root_of
from txtrain.config.overrides import expand
from txtrain.config.paths import CONF, groups_of, options
from txtrain.config.schema import Train
from txtrain.errors import ConfigError
from txtrain.ground.convert import build, key_paths
from txtrain.objectives.base_config import ObjectiveConfig
from txtrain.registry import TABLE, Option, imported

MISTAKES = [
    ("data.seq_ln=3", "Did you mean data.seq_len?"),
    ("model=mistrall", "Did you mean model=mistral?"),
    ("model/attention=gqaa", "must be one of gqa, mha, mla, mqa. Did you mean model/attention=gqa?"),
    ("+model.attention.typo=1", "`model.attention.typo=1`: model.attention has no key typo."),
    ("model.n_heads=5 model.dim=64", "`model.n_heads` must divide model.dim (64)"),
    ("model.n_heads=8 model/attention=gqa model.attention.n_kv_heads=3", "must divide model.n_heads (8), but is 3 instead. Nearest: 2, 4."),
    ("trainer.max_steps=-1", "`trainer.max_steps` must be at least 1 or null, but is -1 instead."),
    ("trainer.max_steps=abc", "`trainer.max_steps` must be an integer or null, but is 'abc' instead."),
    # spellings that people try
    ("model.position=rope", "Write model/position=rope."),
    ("model/norm_position=pre", "Write model.norm_position=pre."),
    ("model.attention=mla", "Write model/attention=mla."),
    ("--model=mistral", "write model=mistral"),
    ("--config x.yaml", "recipe=NAME"),
    ("lr=3e-4", "Did you mean optimizer.lr?"),
    ("data.batch_size=8", "Did you mean data.global_batch_size?"),
    ("trainer.accumulate_grad_batches=4", "Did you mean data.micro_batch_size? Accumulation is derived"),
    ("trainer.gradient_accumulation_steps=4", "Did you mean data.micro_batch_size? Accumulation is derived"),
    ("model.num_key_value_heads=4", "Did you mean model.attention.n_kv_heads?"),
    ("per_device_train_batch_size=4", "Did you mean data.micro_batch_size?"),
    ("window=4", "Did you mean model.attention.window?"),
    ("report_to=wandb", "Did you mean logger=NAME?"),
    # options, groups, keys
    ("modle=gpt2", "Did you mean model?"),
    ("model/atention=mqa", "Did you mean model/attention=mqa?"),
    ("model.atention.window=4", "Did you mean model.attention.window?"),
    ("data/seq_len=4", "Write data.seq_len=4."),
    ("data.text_column=x", "Only data=text, data=hf, data=labels have it."),
    ("data=text", "`data.path` must be given."),
    ("recipe=nope", "`recipe=nope` must be one of"),
    ("model=null", "must be one of"),
    ("model=1", "must be one of"),
    ("model=[gpt2,llama2]", "To run each: -m model=gpt2,llama2."),
    ("model@x=gpt2", "Write model=gpt2."),
    ("optimizer.type=adam", "write optimizer=adam"),
    ("model.attention.type=mqa", "write model/attention=mqa"),
    ("model.position={type:rope}", "write model/position=rope"),
    ("model={attention:{type:mqa}}", "write model/attention=mqa"),
    ("docs=3", "the configuration has no key docs"),
    ("~foo", "foo"),
    ("hydra/launcher=nope -m", "`hydra/launcher=nope` must be one of basic, slurm."),
    ("hydra/launcher=slrum -m", "Did you mean hydra/launcher=slurm?"),
    ("hydra/launcher=slurm", "`hydra/launcher=slurm` needs -m: launchers run sweeps"),
    ("hydra.launcher.partition=gpu -m", "`hydra.launcher.partition` is for hydra/launcher=slurm"),
    ("hydra/launcher=slurm hydra.launcher.partitoin=gpu -m", "Did you mean hydra.launcher.partition?"),
    ("hydra/launcher=slurm hydra.launcher.timeout_min=2h -m", "`hydra.launcher.timeout_min` must be an integer, but is '2h' instead."),
    ("hydra/launcher=slurm hydra.launcher.signal_delay_s=60 hydra.launcher.timeout_min=1 -m", "must be above 0 and below timeout_min (60 s)"),
    # values
    ("model.norm_position=per", "must be one of pre, post, inner, sandwich, but is 'per' instead. Did you mean pre?"),
    ("model.n_layers=2.5", "must be an integer"),
    ("model.n_layers=true", "must be an integer"),
    ("model.n_layers=", "must be an integer"),
    ("model.tie_word_embeddings=1", "must be true or false"),
    ("optimizer.lr=nan", "must be a number"),
    ("optimizer.lr=1e-3,2e-3", "-m runs each"),
    ("optimizer.lr=interval(0,1) -m", "must be values that can be counted"),
    ("optimizer.betas=[0.9]", "a list of 2 values"),
    ("model.dim=${nope}", "`model.dim`: Interpolation key 'nope' not found."),
    ("model.dim=(", "Quote it: 'model.dim=\"(\"'."),
    ("mödel=gpt2", "has no key mödel. Did you mean model?"),
    ("model.dïm=4", "model has no key dïm. Did you mean model.dim?"),
    ("freeze=[a,f(x]", "Quote it: 'freeze=[\"a\",\"f(x\"]'."),
    ("model/position=rope model.position.scaling={rope_type:liner,factor:2}", "Did you mean linear?"),
    ("model/position=rope model.position.scaling.factor=2", "`model.position.scaling.rope_type` must be one of"),
    ("model=deepseek_r1 model.mtp_depth=4 data.seq_len=4", "`model.mtp_depth` must be below data.seq_len (4), but is 4 instead. Nearest: 3."),
    ("save=none", "`save` must be a mapping"),
    # verbs and flags
    ("trian", "Did you mean train?"),
    ("serve", "must be a verb (train, generate, evaluate, predict, export, plan, prepare, preview)"),
    ("mistral", "Did you mean model=mistral?"),
    ("model=gpt2 train", "The verb comes first."),
    ("--confg", "Did you mean --cfg?"),
    ("--help plan.memory", "Did you mean txtrain plan --help plan.memory?"),
    ("--help lr", "Did you mean optimizer.lr?"),
    ("--cfg jub", "Did you mean job?"),
    ("--cfg", "must be followed by"),
    ("--config-dir nope", "must be a folder that exists"),
    ("--info", "is not a flag"),
    ("--lr 3e-4", "Overrides have no dashes: write lr=3e-4."),
    # words and units of other tools
    ("trainer.precision=bf16", "Did you mean bf16-mixed?"),
    ("strategy=zero3", "Did you mean strategy=deepspeed_stage_3?"),
    ("trainer.max_time=90", "`trainer.max_time` must be DD:HH:MM:SS, but is '90' instead."),
    ("plan plan.memory=80", "`plan.memory` must be a size such as 80GB or 79.6GiB, but is '80' instead."),
    (f"plan plan.memory={'9' * 400}GB", "`plan.memory` must be a size such as 80GB"),
    (f"trainer.max_time={'9' * 400}:00:00:00", "`trainer.max_time` must be DD:HH:MM:SS"),
    ("-m seed=range(5,5)", "`seed=range(5,5)` must be at least one value, but stands for none."),
    ("-m model=glob(zzz*)", "`model=glob(zzz*)` must be at least one value, but stands for none."),
    # generate
    ("generate model=gpt2", "the configuration has no key model"),
    ("generate prompt=x", "`checkpoint` must be given"),
    ("generate checkpoint=x", "`prompt` must be given"),
    ("generate checkpoint=x prompt=y max_length=3", "Did you mean max_new_tokens?"),
    ("generate run=x prompt=y", "Did you mean checkpoint?"),
    ("generate .. prompt=y", "`..` must be KEY=VALUE. Did you mean checkpoint=..?"),
    ("..", "Did you mean resume=.. or init_from=..?"),
    ("prepare out=x ..", "Did you mean data.path=..?"),
    # code
    ("optimizer._target_=os.system", "only under logger and callbacks"),
    ("logger.x._target_=os.system", "must be a class in a module given by imports"),
    ("callbacks.x._target_=lightning.pytorch.callbacks.timer.os.system", "must be a class in a module given by imports"),
    ("callbacks.x._target_=txtrain.cli.sweep.subprocess.Popen", "must be a class in a module given by imports"),
    ("callbacks.x._target_=lightning.pytorch.callbacks.LambdaCallback", "must be a class in a module given by imports"),
    ("callbacks.x._target_=EarlyStoping", "Did you mean lightning.pytorch.callbacks.EarlyStopping?"),
    ("callbacks.x={_target_:lightning.pytorch.callbacks.Timer,_args_:[1]}", "of Hydra's keys for objects only _target_ is known"),
    ("logger=wandb logger.settings.api_key=x", "it looks like a secret"),
    ("logger=wandb logger.notes=0123456789abcdef0123456789abcdef01234567", "it looks like a secret"),
    ("data.path=https://me:word@host/x", "it looks like a secret"),
    ("name=../x", "`name` must be the name of a folder in runs/"),
    ("name=/tmp/x", "`name` must be the name of a folder in runs/"),
    ("logger.x={_target_:lightning.pytorch.loggers.CSVLogger,y:{_target_:os.system}}", "`logger.x.y._target_` must be a class"),
]


@pytest.mark.parametrize(("line", "says"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_is_told_in_one_message_and_leaves_nothing(line, says, capsys, clean_room):
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    assert says in err
    assert err.count("\n") == 1
    assert err.startswith("txtrain: ")
    assert "Traceback" not in err
    assert not out
    assert not list(clean_room.iterdir())


def test_all_problems_are_told_at_once(capsys):
    assert main(["model.n_layers=x", "optimizer.lr=y", "foo=1"]) == 2
    assert capsys.readouterr().err.count("txtrain: ") == 3


def test_python_raises_the_same_words_as_a_value_error():
    with pytest.raises(ConfigError, match=r"Did you mean data\.seq_len\?") as e:
        txtrain.compose(["data.seq_ln=3"])
    assert isinstance(e.value, ValueError)
    with pytest.raises(ConfigError, match="`verb` must be one of"):
        txtrain.compose([], verb="trian")


@pytest.mark.parametrize("line", ["generate checkpoint=locked/run prompt=a", "init_from=locked/run", "data=text data.path=locked/a.txt"])
def test_what_may_not_be_read_is_told_in_one_message(line, capsys, clean_room, monkeypatch):
    """Root may read everything: that the folder above is another's is feigned."""
    stat = os.stat

    def denied(path, *args, **keys):
        if isinstance(path, (str, Path)) and Path(path).parent.name == "locked":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, *args, **keys)

    monkeypatch.setattr(os, "stat", denied)
    (clean_room / "locked").mkdir()
    assert main(line.split()) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert re.search("locked/.*ermission denied", said)


def test_a_mistake_shows_its_traceback_only_when_asked(cli, clean_room):
    quiet, loud = cli("model=mistrl"), cli("model=mistrl", TXTRAIN_DEBUG="1")
    assert (quiet.returncode, loud.returncode) == (2, 2)
    assert "Traceback" not in quiet.stderr
    assert "Traceback" in loud.stderr
    assert not list(clean_room.iterdir())


def test_alone_is_gpt2_on_wikitext():
    cfg = compose()
    assert (cfg.model.family, cfg.data.type, cfg.name) == ("gpt2", "wikitext", "gpt2-wikitext")
    assert compose(["model=mistral_7b", "data=python_docs"]).name == "mistral_7b-python_docs"
    assert compose(["name=mine"]).name == "mine"


@pytest.mark.parametrize("flags", [["--cfg", "job"], ["--cfg=job"], ["-c", "job", "--resolve"]])
def test_cfg_job_prints_what_builds_the_same_config(flags, capsys):
    overrides = ["model=mistral", "model.n_layers=3", "optimizer.lr=1e-5"]
    assert main([overrides[0], *flags, *overrides[1:]]) == 0
    assert build(Train, yaml.safe_load(capsys.readouterr().out)) == compose(overrides)


def test_cfg_job_of_a_sweep_prints_each(capsys):
    assert main(["-m", "model=gpt2,mistral", "--cfg", "job"]) == 0
    assert [c["model"]["family"] for c in yaml.safe_load_all(capsys.readouterr().out)] == ["gpt2", "mistral"]


@pytest.mark.parametrize("what", ["hydra", "all"])
def test_cfg_of_hydra_is_printed(what, capsys):
    assert main(["--cfg", what, "--resolve"]) == 0
    assert "launcher" in capsys.readouterr().out


HELP = [["--help"], ["train", "--help"], ["generate", "-h"]]


@pytest.mark.parametrize("args", HELP)
def test_help_fits_the_screen_and_complains_of_nothing(args, cli):
    said = cli(*args)
    assert said.returncode == 0
    assert not said.stderr
    assert max(map(len, said.stdout.splitlines())) < 120


@pytest.mark.slow  # for a quiet machine: beside a busy core the same work counts up to half as much CPU time again
@pytest.mark.parametrize("args", HELP)
def test_help_answers_at_once(args, cli):
    begin = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    cli(*args)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - begin < 0.5


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_is_one_row_and_its_help_names_every_option_and_every_key(verb):
    text, root = usage(verb), root_of(verb)
    assert callable(imported(VERBS[verb].run))
    inherited = key_paths(Train) if root is not Train and issubclass(root, Train) else {}
    for key in key_paths(root).keys() - inherited:
        below = any(other.startswith(f"{key}.") for other in key_paths(root))
        assert below or key.endswith(".type") or f"  {key}" in text, key
    for group in groups_of(root) if not inherited else ():
        for option in options(group):
            assert option in text, option


def test_every_option_says_what_it_is():
    silent = [f"{g}={o}" for g in [*groups_of(Train), "hydra/launcher"] for o in options(g) if not said_of_options(g)[o]]
    assert not silent
    assert "optimizer=adam_2017 " in usage("train", ["optimizer"])
    assert "1706.03762" in usage("train", ["optimizer=adam"])


def test_help_of_a_key_is_the_comment_of_its_field():
    assert usage("train", ["run_dir"]).split() == "run_dir=null null: runs/<name>/<date>_<time>".split()
    assert usage("train", ["model.attention.kv_rank"]).split()[1:3] == ["[mla]", "size"]
    with pytest.raises(ConfigError, match=r"Did you mean txtrain --help trainer\.max_steps\?"):
        usage("train", ["trainer.max_stepz"])


@dc.dataclass(frozen=True, kw_only=True)
class Hello:
    """The keys of a verb that this test adds."""

    whom: str = "you"  # is greeted
    imports: tuple[str, ...] = ()


def greet(job):
    print(f"Hello {job.config.whom}")
    return 0


def test_a_new_verb_is_a_row_and_a_module(monkeypatch, clean_room, capsys):
    monkeypatch.setitem(VERBS, "hello", Verb("greet", f"{__name__}:Hello", f"{__name__}:greet", ""))
    assert main(["hello", "whom=Ada"]) == 0
    assert capsys.readouterr().out == "Hello Ada\n"
    assert main(["hello", "--help"]) == 0
    assert re.search(r"whom=you +is greeted", capsys.readouterr().out)
    assert main(["hello", "who=Ada"]) == 2
    assert "Did you mean whom?" in capsys.readouterr().err


@dc.dataclass(frozen=True, kw_only=True)
class Told(ObjectiveConfig):
    """What a test tells.

    And more.
    """


def test_an_option_without_a_file_has_its_type_alone(monkeypatch):
    monkeypatch.setitem(TABLE["objective"], "told", Option(Told, "nowhere:Told"))
    assert compose(["objective=told"]).objective == Told(type="told")
    assert "objective=told                       What a test tells." in usage("train", ["objective"])


@pytest.mark.parametrize(
    ("args", "absent"),
    [
        ("['--help']", "hydra torch"),
        ("['train', '--help']", "hydra torch"),
        ("['--cfg', 'job']", "torch lightning datasets txtrain.checkpoint"),
        ("['plan', 'plan.format=json']", "torch lightning datasets rich txtrain.checkpoint txtrain.hf.registry"),
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(args, absent):
    code = f"import sys, txtrain.cli.main as c; c.main({args}); print([m for m in {absent.split()} if m in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "[]\n"


def test_garbage_is_looked_for_as_ever_once_the_work_begins(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["txtrain", "--help"])
    before, during = gc.get_threshold(), []
    monkeypatch.setattr(command_line, "overview", lambda: during.append(gc.get_threshold()) or "")
    try:
        assert main() == 0
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
    assert gc.get_threshold() == before != during[0]


def test_a_run_gets_the_config_its_grafts_and_what_was_given(monkeypatch):
    import txtrain.training.run

    calls = []
    monkeypatch.setattr(txtrain.training.run, "run_train", lambda config, origin: calls.append((config, origin)) or 75)
    assert main(["model=gpt2", "model/ffn=swiglu", "name=x"]) == 75
    config, origin = calls[0]
    assert config == compose(["model=gpt2", "model/ffn=swiglu", "name=x"])
    assert origin.given == ["model", "model/ffn", "name"]
    assert origin.grafts["ffn"]["to"] == "swiglu"


def test_a_further_rank_takes_the_first_ones_config_whatever_the_line_says(monkeypatch, clean_room, capsys):
    assert main(["model=mistral", "--cfg", "job"]) == 0
    (clean_room / "config.yaml").write_text(capsys.readouterr().out)
    calls = []
    monkeypatch.setattr(command_line, "work_of", lambda verb, job: lambda: calls.append(job) or 0)
    monkeypatch.setenv("TXTRAIN_CONFIG", str(clean_room / "config.yaml"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main(["-m", "model=gpt2,llama2"]) == 0
    assert [c.config.model.family for c in calls] == ["mistral"]
    monkeypatch.setenv("TXTRAIN_CONFIG", str(clean_room / "config.yaml"))
    monkeypatch.delenv("LOCAL_RANK")  # a forgotten variable does not hide what is typed
    assert main(["model=gpt2"]) == 0
    assert calls[-1].config.model.family == "gpt2"


def test_each_override_is_parsed_once(monkeypatch, loader):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    read, parse_rule = [], OverridesParser.parse_rule
    monkeypatch.setattr(OverridesParser, "parse_rule", lambda self, s, rule: read.append(s) or parse_rule(self, s, rule))
    jobs = [compose_job("train", job, loader)[0] for job in expand(["model=mistral", "optimizer.lr=1e-3,2e-3"], True, loader)]
    assert [job.config.optimizer.lr for job in jobs] == [1e-3, 2e-3]
    assert read == ["model=mistral", "optimizer.lr=1e-3,2e-3"]


def test_it_works_inside_another_hydra_application():
    from hydra import compose as other
    from hydra import initialize_config_dir

    with initialize_config_dir(str(CONF), version_base=None):
        assert txtrain.compose(["model=gpt2"]).model.family == "gpt2"
        assert other("train").seed == 1337


def test_a_job_composes_in_a_tenth_of_a_second_or_so(job):
    job("model=mistral")
    begin = time.process_time()
    job("model=gemma2", "model/attention=mqa", "model.n_layers=2")
    assert time.process_time() - begin < 0.6

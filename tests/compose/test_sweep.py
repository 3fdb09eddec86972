"""-m: validated before the first starts, every job runs, one process each, exit codes."""

import itertools
import os
import signal
import sys
import time

import pytest
import yaml

from tests.cases import some
from tests.training import TINY, write_text
from txtrain import compose
from txtrain.cli import sweep as sweep_module
from txtrain.cli.main import main
from txtrain.cli.verbs import work_of
from txtrain.config.composed import Composed, from_file, to_file
from txtrain.config.paths import options
from txtrain.config.schema import Train
from txtrain.monitor.metrics_csv import read

SMALL = ("model.n_layers=1", "model.dim=32", "model.n_heads=2", "model.vocab_size=300", "model.max_seq_len=32", "data.tokenizer=bytes")

# Stands in for `python -m txtrain`: takes the job, leaves what it got, ends as it is told.
CHILD = """
import pathlib, sys, types, yaml
import txtrain.ground.convert, txtrain.training
stand_in = txtrain.training.run = sys.modules["txtrain.training.run"] = types.ModuleType("txtrain.training.run")  # before torch is imported
def run_train(config, origin):
    folder = pathlib.Path(config.run_dir or f"runs/{config.name}/{origin.folder}"); folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(txtrain.ground.convert.plain(config)))
    (folder / "notes.yaml").write_text(yaml.safe_dump({"grafts": origin.grafts, "given": origin.given}))
    if config.seed == 7: raise RuntimeError("seed 7")
    return {8: 75, 9: 2}.get(config.seed, 0)
stand_in.run_train, stand_in.Origin = run_train, lambda grafts, given, folder, start, notes: types.SimpleNamespace(**locals())
from txtrain.cli.main import main
sys.exit(main())
"""

COUNTS_SIGNALS = """
import signal, sys, time
n = 0
def count(*_):
    global n
    n += 1
signal.signal(signal.SIGINT, count)
open(sys.argv[1], "x")
while not n: time.sleep(0.01)
time.sleep(0.3)
sys.exit(75 if n == 1 else 3)
"""


@pytest.fixture
def fake(monkeypatch):
    """Children that do not train."""

    def start(group, verb, file):
        group.start([sys.executable, "-c", CHILD, verb], [os.environ | {"TXTRAIN_CONFIG": str(file)}])

    monkeypatch.setattr(sweep_module, "_start", start)


def test_every_combination_gets_a_numbered_folder(fake, clean_room):
    assert main(["-m", "model=gpt2,mistral", "model.norm_position=pre,post", "name=a b", "model/ffn=geglu"]) == 0
    runs = sorted((clean_room / "runs/a b").iterdir())
    assert [r.name.rpartition("-")[2] for r in runs] == ["0", "1", "2", "3"]
    made = [yaml.safe_load((r / "config.yaml").read_text())["model"] for r in runs]
    assert [(m["family"], m["norm_position"]) for m in made] == list(itertools.product(["gpt2", "mistral"], ["pre", "post"]))
    notes = yaml.safe_load((runs[1] / "notes.yaml").read_text())
    assert notes["given"] == ["model", "model.norm_position", "name", "model/ffn"]
    assert notes["grafts"]["ffn"]["to"] == "geglu"
    assert notes["grafts"]["norm_position"]["to"] == "post"
    assert {p.name for p in clean_room.iterdir()} == {"runs"}  # no multirun.yaml, no .hydra


def test_in_a_slurm_job_the_members_folders_survive_a_requeue(fake, clean_room, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert main(["-m", "seed=1,2", "name=a"]) == 0
    assert sorted(path.name for path in (clean_room / "runs/a").iterdir()) == ["slurm-77-0", "slurm-77-1"]


def test_a_run_dir_that_is_given_holds_the_numbers(fake, clean_room):
    assert main(["-m", "seed=1,2", "run_dir=out"]) == 0
    assert sorted(p.name for p in (clean_room / "out").iterdir()) == ["0", "1"]


def test_nothing_starts_if_one_job_is_wrong(fake, clean_room, capsys):
    assert main(["-m", "model=gpt2,mistral", "model.attention.window=5,x"]) == 2
    assert "`model.attention.window` must be" in capsys.readouterr().err
    assert not list(clean_room.iterdir())


@pytest.mark.parametrize("seeds", some(WORST := {"7,1": 1, "8,1": 75, "8,7,1": 1, "9,1": 1, "1,2": 0}, ("8,7,1", "1,2")))
def test_every_job_runs_and_the_worst_decides(seeds, fake, clean_room, capfd):
    assert main(["-m", f"seed={seeds}", "run_dir=out"]) == WORST[seeds]
    assert len(list((clean_room / "out").iterdir())) == len(seeds.split(","))
    told = capfd.readouterr().err
    assert told.count("(exit code") == len(set(seeds) & {"7", "9"})
    assert told.count("was preempted") == seeds.count("8")


def test_a_signal_reaches_the_running_job_once_and_no_other_starts(clean_room, monkeypatch):
    started, ready = [], clean_room / "ready"

    def start(group, verb, file):
        group.start([sys.executable, "-c", COUNTS_SIGNALS, str(ready)], [dict(os.environ)])
        while not ready.exists():
            time.sleep(0.01)
        started.append(group._children[0])
        signal.setitimer(signal.ITIMER_REAL, 0.2)

    monkeypatch.setattr(sweep_module, "_start", start)
    old = signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    try:
        assert main(["-m", "seed=1,2,3", "run_dir=out"]) == 75
    finally:
        signal.signal(signal.SIGALRM, old)
    assert [child.returncode for child in started] == [75]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_named_launcher_of_hydra_gets_the_jobs(clean_room, monkeypatch):
    ran = []
    monkeypatch.setattr("txtrain.cli.train.run_train", lambda job: ran.append(job) or (75 if job.config.seed == 2 else 0))
    assert main(["-m", "seed=1,2", "model/ffn=swiglu", "hydra/launcher=basic", "name=it's $x"]) == 75
    assert [c.folder.rpartition("-")[2] for c in ran] == ["0", "1"]
    assert all((c.config.name, c.config.run_dir) == ("it's $x", None) for c in ran)
    assert ran[1].grafts["ffn"]["to"] == "swiglu"
    assert ran[1].given == ["seed", "model/ffn", "name"]
    assert not list(clean_room.iterdir())  # hydra.sweep.dir is a folder that exists, since Hydra's launcher makes it


def test_a_sweep_over_prompts_writes_no_folder(monkeypatch, clean_room):
    said = []
    monkeypatch.setattr(sweep_module, "_in_subprocesses", lambda verb, jobs, _: said.extend(j.config.prompt for j in jobs) or [0] * len(jobs))
    assert main(["generate", "-m", "checkpoint=r", "prompt=a b,it's", "temperature=0,1"]) == 0
    assert said == ["a b", "a b", "it's", "it's"]
    assert not list(clean_room.iterdir())


def test_ranges_and_globs_are_swept(monkeypatch):
    jobs = []
    monkeypatch.setattr(sweep_module, "_in_subprocesses", lambda verb, made, _: jobs.extend(made) or [0] * len(made))
    assert main(["-m", "model/attention=glob(*)", "seed=range(1,3)"]) == 0
    assert [(j.config.model.attention.type, j.config.seed) for j in jobs] == list(itertools.product(options("model/attention"), [1, 2]))


def test_composing_jobs_is_quick(job):
    begin = time.process_time()
    for seed in range(5):
        job(f"seed={seed}")
    assert time.process_time() - begin < 3


@pytest.mark.parametrize("positions", some(["pre,post", "pre,post,sandwich"], ["pre,post"]))
def test_a_sweep_trains_in_numbered_folders_and_says_which_is_which(positions, cli, clean_room):
    write_text(clean_room / "text.txt")
    tiny = [line for line in TINY if not line.startswith(("model=", "trainer.max_steps="))]
    swept = cli("-m", "model=gpt2", f"model.norm_position={positions}", *tiny, "data.path=text.txt", "trainer.max_steps=2")
    assert swept.returncode == 0, swept.stderr
    listed = positions.split(",")
    for number, position in enumerate(listed):
        assert f"txtrain: job {number} (of 0 to {len(listed) - 1}): model.norm_position={position}\n" in swept.stderr
        (run,) = (clean_room / "runs/gpt2-text").glob(f"*-{number}")
        assert yaml.safe_load((run / "config.yaml").read_text())["model"]["norm_position"] == position
        assert [row["step"] for row in read(run / "metrics.csv")] == ["1", "2"]


@pytest.mark.slow
def test_a_job_that_falls_back_says_so_in_the_name_of_its_folder(monkeypatch, clean_room):
    """As the processes of a sweep do: the name changes once the data is looked for, after the job was handed over."""
    config = compose(["data=wikitext", "trainer.accelerator=cpu", "trainer.max_steps=1", "trainer.limit_val_batches=0", "sample.n=0", *SMALL])
    monkeypatch.setattr("txtrain.data.sources.wikitext.WikiText.unavailable", lambda self: "no hub here")
    job = sweep_module.in_folder(Composed(config, {}, []), "now", 3)
    to_file(job, clean_room / "job.yaml")
    assert work_of("train", from_file(Train, clean_room / "job.yaml"))() == 0
    assert [p.name for p in (clean_room / "runs").iterdir()] == ["gpt2-wikitext-fallback"]
    assert (clean_room / "runs/gpt2-wikitext-fallback/now-3/run.json").is_file()

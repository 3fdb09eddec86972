"""Jobs from submission to their end, on a SLURM that the test starts."""

import pytest

from tests.slurm.jobs import ONE_CPU, TWO_NODES, facts, said, submit
from tests.training import write_text
from txtrain.monitor.metrics_csv import read

# Stands in for txtrain: its first start ends as $MODE says, its second well. `requeue`: it asks SLURM itself, as txtrain does.
ENDS = """\
#!/bin/bash
case "$*" in plan*|*--cfg*) exit 0 ;; esac
echo "start ${SLURM_RESTART_COUNT:-0} of task $SLURM_PROCID: $*"
[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || exit 0
case $MODE in
  kill) kill -9 $$ ;;
  kill-one) [ "$SLURM_PROCID" = 1 ] && kill -9 $$; sleep 1; exit 1 ;;
  requeue) [ "$SLURM_PROCID" = 0 ] && scontrol requeue "$SLURM_JOB_ID"; exit 75 ;;
  cancel) [ "$SLURM_PROCID" = 0 ] && scancel "$SLURM_JOB_ID"; sleep 60 & trap 'exit 75' TERM; wait; wait ;;
  *) exit "$MODE" ;;
esac
"""


@pytest.fixture
def ending(cluster, tmp_path):
    """ending("75", "many_nodes.sh", ...): the number of a job whose processes end so."""
    command = tmp_path / "bin/txtrain"
    command.parent.mkdir()
    command.write_text(ENDS)
    command.chmod(0o755)

    def start(mode, script, *words):
        return submit(cluster, tmp_path, script, *words, PATH=f"{command.parent}:{cluster.environment['PATH']}", MODE=mode)

    return start


@pytest.mark.slow
def test_the_smoke_test_trains_on_two_nodes_to_its_end(cluster, tmp_path):
    text = ["data=text", f"data.path={write_text(tmp_path / 'text.txt')}", "data.val_fraction=0.2", f"data.cache_dir={tmp_path / 'cache'}"]
    steps = ["trainer.max_steps=4", "trainer.val_check_interval=4", "trainer.log_every_n_steps=1", "sample.n=0"]
    number = submit(cluster, tmp_path, "cpu_smoke.sh", *text, *steps)
    job = cluster.until(number, "ended")
    assert (job["JobState"], job["NumNodes"], job["NumTasks"]) == ("COMPLETED", "2", "2"), said(tmp_path, number)
    run = tmp_path / f"runs/smoke/slurm-{number}"
    assert [row["step"] for row in read(run / "metrics.csv")] == ["1", "2", "3", "4"]
    assert (facts(run)["status"], facts(run)["hardware"]["processes"]) == ("complete", 2)


@pytest.mark.slow
def test_a_job_is_requeued_once_where_it_was_stopped_or_killed_and_nowhere_else(cluster, tmp_path, ending):
    (tmp_path / "one.txt").write_text("seed=1\n")
    scripts = {"one_node.sh": ONE_CPU, "cpu_smoke.sh": (), "array.sh": (*ONE_CPU, "one.txt")}
    stopped = {script: ending("75", script, *words) for script, words in scripts.items()}
    jobs = {mode: ending(mode, "many_nodes.sh", *TWO_NODES) for mode in ("75", "requeue", "kill", "kill-one", "1", "2", "cancel")}
    unwanted = ending("75", "many_nodes.sh", *TWO_NODES, "trainer.auto_requeue=false")
    ends = {name: cluster.until(number, "ended") for name, number in {**stopped, **jobs, "unwanted": unwanted}.items()}
    assert {name: (job["JobState"], job["Restarts"]) for name, job in ends.items()} == {
        **dict.fromkeys([*stopped, "75", "requeue", "kill", "kill-one"], ("COMPLETED", "1")),
        **dict.fromkeys(["1", "2", "unwanted"], ("FAILED", "0")),
        "cancel": ("CANCELLED", "0"),
    }


@pytest.mark.slow
def test_a_chain_ends_with_the_first_job_that_fails(cluster, ending):
    number = int(ending("1", "chain.sh", "--cpus-per-task=1"))  # of its last job
    states = [cluster.until(str(n), "ended")["JobState"] for n in range(number - 3, number + 1)]
    assert states == ["FAILED", "CANCELLED", "CANCELLED", "CANCELLED"]

"""A job from submission to its end, on a SLURM that the test starts."""

from tests.slurm.jobs import facts, said, submit
from txtrain.metrics import read


def test_the_smoke_test_trains_on_two_nodes_to_its_end(cluster, tmp_path):
    steps = ["trainer.max_steps=4", "trainer.val_check_interval=4", "trainer.log_every_n_steps=1", "sample.n=0"]
    number = submit(cluster, tmp_path, "cpu_smoke.sh", *steps)
    job = cluster.until(number, "ended")
    assert (job["JobState"], job["NumNodes"], job["NumTasks"]) == ("COMPLETED", "2", "2"), said(tmp_path, number)
    run = tmp_path / f"runs/smoke/slurm-{number}"
    assert [row["step"] for row in read(run / "metrics.csv")] == ["1", "2", "3", "4"]
    assert (facts(run)["status"], facts(run)["hardware"]["processes"]) == ("complete", 2)

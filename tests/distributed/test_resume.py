"""Stopping changes nothing, and neither does the number of processes after it, but rounding."""

import json

import pytest

import txtrain
from tests.distributed.group import Case, command_line, train
from tests.distributed.runs import largest_differences, overrides, tensors
from tests.training import rows
from txtrain.checkpoint.format import locate, read_state

EXACT = {
    "ddp": ("strategy=ddp", "data.micro_batch_size=2"),
    "fsdp": ("strategy=fsdp", "data.micro_batch_size=2"),
}
CUT = {"tp": ("strategy=tp", "data.micro_batch_size=4", "sample.n=1", "ema.decay=0.9")}  # and all processes generate
STOPS = 6


def exact(folder, n, ways=EXACT):
    """Every run of `ways` uninterrupted, and stopped by a signal to one of its processes, then continued: bit for bit the same."""
    shape = ("data.global_batch_size=12", "model.dropout=0.1", f"trainer.devices={n}")
    whole = {way: Case(overrides(folder, "decoder", f"{way}-whole", *shape, *how)) for way, how in ways.items()}
    parts = {way: overrides(folder, "decoder", f"{way}-parts", *shape, *how) for way, how in ways.items()}
    stopped = {f"{way} stopped": Case(run, [f"SIGTERM {STOPS - 1} {n - 1}"]) for way, run in parts.items()}
    train(whole | stopped, n, folder / "first")
    for way in ways:
        assert read_state(locate(folder / f"{way}-parts")).step == STOPS
        assert json.loads((folder / f"{way}-parts/run.json").read_text())["status"] == "preempted"
    train({f"{way} continued": Case(run) for way, run in parts.items()}, n, folder / "second")
    for way in ways:
        a, b = folder / f"{way}-whole", folder / f"{way}-parts"
        assert rows(a) == rows(b), way
        one, other = tensors(a), tensors(b)
        assert one.keys() == other.keys()
        different = [name for name in one if not one[name].equal(other[name])]
        assert not different, (way, different)


@pytest.mark.parametrize("ways", [("fsdp", "tp"), pytest.param(("ddp",), marks=pytest.mark.slow)])
def test_two_processes_stopped_and_continued_are_bit_for_bit_the_uninterrupted_run(ways, tmp_path):
    exact(tmp_path, 2, {way: (EXACT | CUT)[way] for way in ways})


@pytest.mark.slow
def test_three_processes_too(tmp_path):
    """From three on the order of summation shows: DistributedDataParallel fails this."""
    exact(tmp_path, 3)


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [False, True])
def test_a_run_goes_on_with_another_number_of_processes_and_another_strategy(tmp_path, streamed):
    """The same samples in the same steps, whoever reads them."""
    shape = ["data.global_batch_size=12"]
    if streamed:
        lines = [json.dumps({"text": f"Row {i} of the set says {i * i}."}) for i in range(90)]
        (tmp_path / "set.jsonl").write_text("\n".join(lines))
        shape += ["data=hf", f"data.path={tmp_path / 'set.jsonl'}", "data.streaming=true", "data.stream_readers=4", "data.shuffle_buffer=5"]
    reference = txtrain.train(txtrain.compose(overrides(tmp_path, "decoder", "reference", *shape))).run_dir
    run = overrides(tmp_path, "decoder", "moved", *shape)
    txtrain.train(txtrain.compose([*run, "trainer.max_steps=3"]))
    train({"fsdp": Case([*run, "trainer.max_steps=5", "strategy=fsdp", "trainer.devices=2"])}, 2, tmp_path / "2")
    train({"ddp": Case([*run, "trainer.max_steps=8", "strategy=ddp", "trainer.devices=3"])}, 3, tmp_path / "3")
    result = txtrain.train(txtrain.compose(run))
    differences = largest_differences(reference, result.run_dir, ("loss", "grad_norm"))
    assert max(differences.values()) < 1e-5, differences
    hashes = {json.loads((run_dir / "run.json").read_text())["data_order_hash"] for run_dir in (reference, result.run_dir)}
    assert len(hashes) == 1


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_command_line_starts_the_processes_and_the_folder_is_whole(tmp_path, strategy):
    run = overrides(tmp_path, "decoder", "run", "trainer.max_steps=4", "trainer.devices=2", f"strategy={strategy}")
    done = command_line(run, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done:") == 1
    assert f"{strategy}, 2 processes" in done.stdout
    assert "Traceback" not in done.stderr
    assert "warn" not in done.stderr.lower()
    facts = json.loads((tmp_path / "run/run.json").read_text())
    assert (facts["status"], facts["hardware"]["processes"]) == ("complete", 2)
    again = command_line([f"resume={tmp_path / 'run'}", "trainer.devices=1", "trainer.max_steps=6", "strategy=auto"], tmp_path)
    assert again.returncode == 0, again.stderr
    assert [int(row["step"]) for row in rows(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]

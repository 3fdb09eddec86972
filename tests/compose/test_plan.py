"""`txtrain plan`: what the verb prints, and that it says what a run would do without torch and without doing it."""

import json
import os
import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import txtrain
from tests.cases import some
from tests.compose.test_families import PUBLISHED
from txtrain.cli.main import main
from txtrain.config.hardware import PUBLISHED as PEAKS
from txtrain.config.hardware import named
from txtrain.errors import ConfigError
from txtrain.planning.figures import Figures

WITHOUT_TORCH = """
import sys
from txtrain.cli.main import main
code = main(sys.argv[1:])
assert "torch" not in sys.modules, "torch was imported"
sys.exit(code)
"""


PAGE = Path(__file__).parents[2] / "docs" / "plan.md"


def plan(*overrides: str) -> Figures:
    return txtrain.plan(txtrain.compose(overrides, verb="plan"))


def published(name: str, *overrides: str) -> Figures:
    """With its family's own objective and data."""
    return plan(f"model={name}", *overrides)


@pytest.mark.parametrize("name", some(PUBLISHED, [*PUBLISHED][::4]))
def test_every_published_size_counts_as_published(name):
    figures = published(name)
    assert figures.n_params - figures.params_by_part.get("mtp", 0) == PUBLISHED[name]
    assert sum(figures.params_by_part.values()) == figures.n_params


def test_the_largest_model_is_planned_in_two_seconds_without_torch():
    command = [sys.executable, "-c", WITHOUT_TORCH, "plan", "model=deepseek_r1_671b", "plan.format=json"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2  # of the processor: other tests run beside this one
    figures = json.loads(done.stdout)
    assert figures["n_params"] - figures["params_by_part"]["mtp"] == 671_026_404_352
    assert figures["cache_bytes_per_token"] == 61 * (512 + 64) * 2
    assert figures["n_active_params"] == pytest.approx(37e9, rel=0.02)


def test_the_screen_shows_every_part_and_writes_nothing(capsys, clean_room):
    assert main(["plan", "model=deepseek_r1", "trainer.max_steps=100", "plan.n_devices=8", "data.tokenizer=bytes"]) == 0
    out = capsys.readouterr().out
    parts = ("embedding", "attention", "ffn", "mtp", "active")
    for word in ("deepseek_r1: ", *parts, "forward and backward", "in bfloat16", "100 (trainer.max_steps)", "8 x H100", "bytes, 257 tokens of"):
        assert word in out, word
    assert not [f for f in clean_room.iterdir() if f.name != ".cache"]


def test_more_processes_than_a_matrix_has_rows_are_refused_not_divided_by():
    refused = plan("model=t5", "strategy=tp", "trainer.devices=8").refused  # Adafactor's sums along the heads' dimension
    assert refused is not None
    assert "must divide model.n_heads (4)" in refused


def test_a_tokenizer_is_held_against_the_vocabulary_without_torch():
    command = [sys.executable, "-c", WITHOUT_TORCH, "plan", "model=gpt2", "model.vocab_size=256", "data.tokenizer=bytes"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "`model.vocab_size` must be at least 257, the tokens of data.tokenizer=bytes" in done.stderr


def test_json_holds_what_the_function_returns(capsys):
    overrides = ["model=gpt2", "plan.mfu=0.3"]
    assert main(["plan", *overrides, "plan.format=json"]) == 0
    assert Figures(**json.loads(capsys.readouterr().out)) == plan(*overrides)


def test_a_configuration_of_train_is_planned_too():
    config = txtrain.compose(["model=gpt2"])
    assert txtrain.plan(config) == plan("model=gpt2")


def test_time_is_work_over_the_devices_at_their_share_of_the_peak():
    figures = plan("model=gpt2", "trainer.max_steps=1000", "plan.n_devices=4", "plan.mfu=0.5", "plan.device=A100", "trainer.precision=bf16-mixed")
    work = 1000 * 8 * 256 * figures.flops_per_token
    assert figures.flops == pytest.approx(work, rel=1e-12)
    assert figures.seconds == pytest.approx(work / (4 * 0.5 * 312e12), rel=1e-12)
    assert figures.tokens == 1000 * 8 * 256
    assert plan("model=gpt2", "plan.device=A100").peak_flops == 19.5e12, "float32"
    assert plan("model=gpt2", "plan.peak_flops=1e12").peak_flops == 1e12


@pytest.mark.parametrize(
    ("limits", "steps", "limited_by"),
    [
        (("trainer.max_steps=50", "trainer.max_tokens=1_000_000"), 50, "trainer.max_steps"),
        (("trainer.max_steps=null", "trainer.max_tokens=1_000_000"), 489, "trainer.max_tokens"),
        (("trainer.max_steps=null", "trainer.max_epochs=2"), None, None),
        (("trainer.max_steps=50", "trainer.max_epochs=2"), 50, "trainer.max_steps"),
    ],
)
def test_the_first_limit_that_needs_no_data_ends_the_run(limits, steps, limited_by):
    figures = plan("model=gpt2", *limits)
    assert (figures.steps, figures.limited_by) == (steps, limited_by)


def test_a_limit_of_time_gives_the_steps_that_fit():
    figures = plan("model=gpt2", "trainer.max_steps=null", "trainer.max_time=00:00:10:00")
    assert figures.limited_by == "trainer.max_time"
    assert 600 * (1 - 1 / figures.steps) < figures.seconds <= 600


def test_without_a_limit_that_can_be_counted_the_screen_says_so(capsys):
    assert main(["plan", "model=gpt2", "trainer.max_steps=null", "trainer.max_epochs=2"]) == 0
    assert "Give trainer.max_steps or max_tokens." in capsys.readouterr().out


def test_a_pair_has_the_lengths_that_the_objective_makes():
    figures = plan("model=t5_base", "objective=span_corruption")
    assert (figures.sample, figures.seq_len, figures.target_len) == ("pair", 512, 114)  # as in T5's own code
    assert figures.cache_bytes == 12 * 2 * 12 * 64 * 2 * (512 + 114)


def test_an_image_is_planned_as_an_image(capsys):
    figures = published("vit_b16")
    assert (figures.sample, figures.seq_len, figures.cache_bytes_per_token) == ("image", 197, 0)
    assert figures.flops_per_sample == pytest.approx(3 * 35.1e9, rel=0.01)  # 17.6 G multiply-adds an image
    assert main(["plan", "model=vit_b16", "objective=image_classification", "data=digits"]) == 0
    assert "an image" in capsys.readouterr().out


def test_several_are_planned_with_m(cli):
    done = cli("plan", "-m", "model=gpt2,llama2")
    assert done.returncode == 0, done.stderr
    assert "gpt2: " in done.stdout
    assert "llama2: " in done.stdout


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("plan.device=H10", "Did you mean H100?"),
        ("plan.device=h10", "Did you mean H100?"),
        ("plan.device=b100", "Did you mean B200?"),
        ("plan.device=V100 trainer.precision=bf16-mixed", "`trainer.precision` must be 32-true with plan.device=V100, which has no bfloat16"),
        ("plan.mfu=1.5", "`plan.mfu` must be above 0 and at most 1, but is 1.5 instead."),
        ("plan.n_devices=0", "`plan.n_devices` must be at least 1"),
        ("plan.peak_flops=-1", "`plan.peak_flops` must be above 0 or null"),
        ("plan.cache_dtype=int4", "one of bfloat16, float32"),
        ("plan.mfuu=1", "Did you mean plan.mfu?"),
        ("model.n_heads=5", "`model.n_heads` must divide model.dim"),
        ("objective=seq2seq", "`model.topology` must be encoder_decoder with objective=seq2seq"),
    ],
)
def test_mistakes_are_refused_as_in_train(override, said):
    with pytest.raises(ConfigError) as refused:
        plan("model=gpt2", *override.split())
    assert said in str(refused.value)


def test_train_has_no_keys_of_plan():
    with pytest.raises(ConfigError, match="the configuration has no key plan"):
        txtrain.compose(["plan.mfu=0.3"])


def test_a_device_is_known_by_the_longest_part_of_its_name():
    assert named("NVIDIA L40S") is PEAKS["L40S"]
    assert named("NVIDIA L4") is PEAKS["L4"]
    assert named("NVIDIA H100 80GB HBM3") is PEAKS["H100"]
    assert named("NVIDIA GeForce RTX 2080") is None


def test_the_page_shows_what_its_commands_print(capsys):
    """Where a block is shortened (`...`), what is left stands in the output. TXTRAIN_UPDATE_GOLDEN=1 writes the whole ones."""
    page = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"```\ntxtrain (plan .*?)\n```\n```\n(.*?)\n```", page, re.DOTALL)
    assert len(blocks) == 2
    for command, shown in blocks:
        assert main(shlex.split(command.replace("\\\n", " "))) == 0
        printed = capsys.readouterr().out.rstrip()
        if os.environ.get("TXTRAIN_UPDATE_GOLDEN") == "1" and "\n...\n" not in shown:
            PAGE.write_text(page := page.replace(shown, printed), encoding="utf-8")
        else:
            for part in shown.split("\n...\n"):
                assert part in printed, f"docs/plan.md is not current:\n{printed}"


def test_rollouts_are_estimated_by_what_decoding_reads_and_what_fits():
    """By hand: 64 completions on 2 processes, 8 rows together, 100 new tokens after 28; float32."""
    shape = "model=llama2", "model.n_layers=2", "model.dim=64", "model.n_heads=4", "model.vocab_size=257", "model.max_seq_len=128"
    asked = "data=arithmetic", "data.seq_len=128", "objective=grpo", "objective.beta=0", "objective.max_new_tokens=100"
    how = "data.global_batch_size=64", "data.micro_batch_size=8", "plan.n_devices=2", "plan.peak_flops=1e9", "plan.bandwidth=1e6", "plan.mfu=1"
    figures = plan(*shape, *asked, *how, "trainer.max_steps=10")
    found = figures.rollouts
    assert found is not None
    assert (found.n_prompts, found.n_completions, found.rows) == (8, 64, 8)
    a_token = 2 * 2 * 64 * 4  # keys and values of two layers
    assert found.cache_bytes == 8 * (28 + 256) * a_token
    read = 4 * figures.n_params + 8 * 78 * a_token  # half of the completion, in the mean
    prefill = figures.forward_flops_per_token * 28 * 4 / 1e9  # each of this process' 4 prompts once
    assert found.decode_seconds == pytest.approx(4 * 100 * read / 1e6 + prefill)
    assert found.forward_seconds == pytest.approx(32 * 128 * figures.forward_flops_per_token / 1e9)
    assert figures.seconds == pytest.approx(10 * (found.seconds + found.update_seconds))
    assert plan(*shape, *asked, *how, "objective.beta=0.1").rollouts.forward_seconds == pytest.approx(2 * found.forward_seconds)
    assert plan(*shape, "data=arithmetic", "data.seq_len=128", "objective=sft").rollouts is None
    beside = "data=arithmetic", "data.seq_len=128", "objective=grpo", "objective.max_new_tokens=100", "data.global_batch_size=64", "adapter=lora"
    never, reset = plan(*shape, *beside), plan(*shape, *beside, "objective.reference_reset=9")
    assert reset.memory_by_part["read"] - never.memory_by_part["read"] == 4 * reset.n_trained_params > 0
    assert never.memory_by_part["read"] == 4 * (reset.n_params - reset.n_trained_params)
    short = "model=llama2_7b", "strategy=fsdp", "plan.n_devices=64", "data=arithmetic", "data.seq_len=64", "trainer.activation_checkpointing=full"
    with pytest.raises(ConfigError, match=r"at least 10.9GB for a rollout, whose cache takes 9.7GB of them, but is 10GB"):
        plan(*short, *asked[2:4], "objective.max_new_tokens=32", "data.global_batch_size=4096", "plan.memory=10GB")

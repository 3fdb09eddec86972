"""objective=grpo: rollouts and updates as a run makes them."""

import dataclasses as dc
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import txtrain
from tests.training import RUN, weights
from txtrain import compose
from txtrain.config.schema import Train
from txtrain.errors import ConfigError
from txtrain.model.build import build_model
from txtrain.model.lora import attach
from txtrain.monitor.metrics_csv import read
from txtrain.objectives.base import Batch, build_objective
from txtrain.objectives.grpo import GRPO
from txtrain.parallel.build import make_parallel
from txtrain.registry import TABLE
from txtrain.training.batches import cut, seed_everything
from txtrain.training.data_module import DataModule

SHAPE = (
    "model=llama2", "model.n_layers=1", "model.dim=32", "model.n_heads=2", "model.vocab_size=257", "model.max_seq_len=24",
    "data=arithmetic", "data.difficulty=2", "data.n_train=64", "data.n_val=8", "data.seq_len=16", *RUN[:6],
    "sample.n=2", "data.global_batch_size=16", "scheduler=constant", "scheduler.warmup_steps=0", "optimizer.lr=0.01",
    "objective=grpo", "objective.beta=0", "objective.group_size=4", "objective.max_new_tokens=6", "reward=[low]",
)
CLOCK = ("rollout_seconds", "reward_seconds", "rollout_tokens_per_second")


@pytest.fixture(autouse=True)
def low() -> Iterator[None]:
    """A reward that a model without any training can earn: tokens below 64; a text ends by chance."""

    @txtrain.component("reward", "low")
    def low(prompts: Sequence[str], completions: Sequence[str], samples: Sequence[Any]) -> list[float]:
        return [sum(ord(c) < 64 for c in text) / 6 for text in completions]

    yield
    del TABLE["reward"]["low"]


def config(folder: Path, *overrides: str) -> Train:
    made = compose([*SHAPE, f"data.cache_dir={folder / 'cache'}", f"run_dir={folder / 'run'}", *overrides])
    assert isinstance(made, Train)
    return made


def metrics(run_dir: Path | None) -> list[dict[str, str]]:
    """All columns but those of the clock."""
    assert run_dir is not None
    rows = read(run_dir / "metrics.csv")
    names = [name for name in rows[0] if not name.startswith("time/") and name not in CLOCK]
    clocks = ("tokens_per_second", "mfu", "hfu", "seconds", "goodput", "memory_gib")
    return [{name: row[name] for name in names if name not in clocks} for row in rows]


def test_training_earns_more_and_says_what_goes_wrong(tmp_path: Path) -> None:
    result = txtrain.train(config(tmp_path, "trainer.max_steps=24", "trainer.val_check_interval=12", "save.every_n_steps=24"))
    rows = metrics(result.run_dir)
    rewards = [float(row["reward"]) for row in rows]
    assert sum(rewards[-5:]) > sum(rewards[:5]) + 1, rewards
    for row in rows:  # one update a rollout: old and new weights are the same
        assert float(row["ratio_deviation"]) == 0
        assert abs(float(row["loss"])) < 1e-6  # advantages of a group sum to 0
        assert float(row["sampler_difference_max"]) < 1e-5
        assert float(row["reward"]) == pytest.approx(float(row["reward/low"]))
        assert 0 < float(row["entropy"]) < 6
        assert float(row["length"]) <= 6
    assert float(rows[-1]["val_reward"]) == -float(rows[-1]["val_loss"])
    assert result.run_dir is not None
    assert "[low 0." in (result.run_dir / "samples.txt").read_text()


FAMILIES: dict[str, tuple[str, ...]] = {
    "gpt1": ("model.dropout=0",), "gpt2": (), "mistral": ("model.n_heads=4", "model.attention.n_kv_heads=2", "model.attention.window=8"),
    "gemma": ("model.n_heads=4",), "gemma2": ("model.n_heads=4", "model.attention.n_kv_heads=2", "model.attention.window=[8,null]"),
    "deepseek_r1": ("model.n_layers=2", "model.mtp_depth=0", "model.ffn.n_experts=4", "model.ffn.top_k=2"),
    "llama2": ("model.norm_position=sandwich", "model/attention=mqa", "model/ffn=geglu", "model/position=alibi"),
    "bert": ("model.topology=decoder", "model/head=lm", "model.dropout=0"),
}


@pytest.mark.parametrize("family", [pytest.param(name, marks=() if name == "deepseek_r1" else pytest.mark.slow) for name in FAMILIES])
def test_every_decoder_samples_what_it_trains_on(tmp_path: Path, family: str) -> None:
    """And a graft of each axis: the cached sampler, rows of unlike lengths together, against the trainer."""
    made = config(tmp_path, f"model={family}", *FAMILIES[family], "trainer.max_steps=2", "data.micro_batch_size=8")
    for row in metrics(txtrain.train(made).run_dir):
        assert 0 < float(row["sampler_difference_max"]) < 1e-5
        assert float(row["ratio_deviation"]) < 1e-6
        assert float(row["grad_norm"]) > 0


@pytest.mark.parametrize("mixture", [False, True])
def test_a_rollout_in_half_precision_is_kept_in_float32(tmp_path: Path, mixture: bool) -> None:
    """Lightning makes bfloat16 the default dtype within a step; what is added up over a batch must not be rounded."""
    experts = "model/ffn=moe_softmax", "model.ffn.n_experts=4", "model.ffn.top_k=2"
    made = config(
        tmp_path, "trainer.precision=bf16-true", "objective.beta=0.1", "trainer.max_steps=2", "save.every_n_steps=1", "objective.updates_per_rollout=2",
        "objective.prompts_per_rollout=8", "trainer.val_check_interval=1", *(experts if mixture else ()),
    )
    run_dir = txtrain.train(made).run_dir
    assert run_dir is not None
    with np.load(next(iter(sorted(run_dir.rglob("rollout.npz"))))) as kept:
        for name in ("old_log_probs", "sampler_log_probs", "reference_log_probs"):
            assert kept[name].dtype == np.float32, name
    sixths = float(metrics(run_dir)[-1]["val_reward"]) * 6 * 8  # of 8 problems
    assert sixths == pytest.approx(round(sixths), abs=1e-4)
    assert sixths > 0


def test_any_of_the_models_end_tokens_ends_a_completion(tmp_path: Path) -> None:
    """Of a model for chats the end of a turn, beside its tokenizer's end of a text. Half of all tokens end here."""
    ends = ",".join(map(str, [256, *range(128)]))
    for row in metrics(txtrain.train(config(tmp_path, f"model.eos_token_id=[{ends}]", "trainer.max_steps=1")).run_dir):
        assert float(row["truncated_share"]) < 0.1
        assert float(row["length"]) < 3


def test_one_sampled_completion_has_one_column(tmp_path: Path) -> None:
    asked = "objective.val_samples=1", "reward=[low,answer]", "reward.answer.weight=0"
    columns = build_objective(config(tmp_path, *asked)).columns
    assert columns.count("val_pass@1") == 1


def test_pass_at_k_is_of_sampled_completions_of_held_out_problems(tmp_path: Path) -> None:
    """By the reward `answer`; each problem's draws are its own, whatever the batches."""
    asked = "objective.val_samples=4", "trainer.max_steps=1", "trainer.val_check_interval=1", "trainer.limit_val_batches=9"
    right = ["reward=[low,answer]", "reward.answer.weight=0", 'reward.answer.reference_pattern="^"']
    right += ['reward.answer.pattern="^[^!-O]|^"']  # right is what begins with some 50 of 257 tokens, or is empty
    result = txtrain.train(config(tmp_path, *asked, *right))
    row = metrics(result.run_dir)[-1]
    assert 0 < float(row["val_pass@1"]) < float(row["val_pass@4"]) < 1
    model, data = txtrain.load_pretrained(result.run_dir), DataModule(config(tmp_path, *asked, *right))
    objective = build_objective(data.config)
    assert isinstance(objective, GRPO)
    data.prepare()
    objective.tokenizer, objective.parallel = data.tokenizer, make_parallel(data.config)
    one_by_one = [objective.measure(model, batch, None) for batch in data.examples(8, 1)]
    for name in ("val_pass@1", "val_pass@4", "val_reward"):
        assert sum(float(one[name][0, 0]) for one in one_by_one) / 8 == pytest.approx(float(row[name])), name
    assert result.run_dir is not None
    again = [f"data.cache_dir={tmp_path / 'cache'}", "trainer.accelerator=cpu", "n_bootstrap=0", "data.micro_batch_size=3", *SHAPE[6:11]]
    evaluated = txtrain.evaluate(result.run_dir, compose(again, verb="evaluate")).metrics  # the run's objective and rewards
    for name in ("val_pass@1", "val_pass@4", "val_reward"):
        assert evaluated[name].value == pytest.approx(float(row[name])), name
    with pytest.raises(ConfigError, match=r"`objective.val_samples` must be 0 without the reward `answer`"):
        config(tmp_path, *asked)


@pytest.mark.slow
def test_updates_of_a_rollout_divide_it_and_move_away(tmp_path: Path) -> None:
    several = "objective.prompts_per_rollout=8", "objective.updates_per_rollout=4", "trainer.max_steps=5"
    rows = metrics(txtrain.train(config(tmp_path, *several)).run_dir)
    apart = [float(row["ratio_deviation"]) for row in rows]
    assert apart[0] == apart[4] == 0
    assert all(value > 0 for value in apart[1:4])
    assert len({row["reward"] for row in rows[:4]}) == 1
    assert rows[4]["reward"] != rows[0]["reward"]


def test_a_run_resumed_within_a_rollout_equals_one_that_was_not_stopped(tmp_path: Path) -> None:
    several = "objective.updates_per_rollout=4", "save.every_n_steps=2", "trainer.val_check_interval=2"
    whole = txtrain.train(config(tmp_path / "a", *several, "trainer.max_steps=8"))
    stopped = config(tmp_path / "b", *several, "trainer.max_steps=6")
    part = txtrain.train(stopped)
    assert part.run_dir is not None
    assert (part.run_dir / "checkpoints" / "step_00000006" / "rollout.npz").exists()
    rest = txtrain.train(dc.replace(stopped, trainer=dc.replace(stopped.trainer, max_steps=8)))
    assert metrics(rest.run_dir) == metrics(whole.run_dir)
    assert whole.run_dir is not None
    assert weights(part.run_dir) == weights(whole.run_dir)
    assert (part.run_dir / "samples.txt").read_text() == (whole.run_dir / "samples.txt").read_text()


@pytest.mark.parametrize("said", [b"", b"[]", b'{"texts": 3}', b'{"texts": [["a", "b"]]}', b'{"texts": [["a", "b", {"low": "much"}]]}'])
def test_damaged_texts_of_a_rollout_are_refused_by_their_file(tmp_path: Path, said: bytes) -> None:
    given = config(tmp_path, "trainer.max_steps=1", "save.every_n_steps=1")
    run_dir = txtrain.train(given).run_dir
    assert run_dir is not None
    (file,) = run_dir.rglob("rollout.npz")
    with np.load(file) as kept:
        arrays = {**kept}
    np.savez(file, **arrays | {"texts": np.frombuffer(said, np.uint8)})
    objective = build_objective(given)
    with pytest.raises(ConfigError, match=r"rollout.npz: texts must be"):
        objective.load_state(file.parent)
    del arrays["texts"]  # of an earlier version
    np.savez(file, **arrays)
    objective.load_state(file.parent)


RESET = "objective.beta=0.1", "objective.updates_per_rollout=2", "objective.reference_reset=4"


def kl(run_dir: Path | None) -> list[float]:
    return [float(row["kl"]) for row in metrics(run_dir)]


def test_a_reset_reference_is_the_policy_of_then_and_resumes_exactly(tmp_path: Path) -> None:
    """A stop after a reset, in front of a rollout that reads what was reset."""
    run = *RESET, "save.every_n_steps=6", "trainer.val_check_interval=2"
    whole = txtrain.train(config(tmp_path / "a", *run, "trainer.max_steps=8"))
    stopped = config(tmp_path / "b", *run, "trainer.max_steps=6")
    part = txtrain.train(stopped)
    assert metrics(txtrain.train(dc.replace(stopped, trainer=dc.replace(stopped.trainer, max_steps=8))).run_dir) == metrics(whole.run_dir)
    assert part.run_dir is not None
    assert whole.run_dir is not None
    held = weights(part.run_dir)
    assert held == weights(whole.run_dir)
    assert held["reference.head.weight"] != held["model.head.weight"]
    never = txtrain.train(config(tmp_path / "c", *RESET[:2], "trainer.max_steps=5"))
    assert kl(whole.run_dir)[:4] == kl(never.run_dir)[:4]
    assert kl(whole.run_dir)[4] == pytest.approx(0, abs=1e-9)
    assert kl(never.run_dir)[4] > 1e-4
    assert not any(name.startswith("reference") for name in weights(never.run_dir or tmp_path))


@pytest.mark.slow
def test_the_reference_of_an_adapter_is_reset_to_base_and_adapter(tmp_path: Path) -> None:
    base = txtrain.train(config(tmp_path / "base", "trainer.max_steps=1"))
    run = [f"init_from={base.run_dir}", "adapter=lora", "adapter.r=4", *RESET, "save.every_n_steps=6", "trainer.val_check_interval=2"]
    whole = txtrain.train(config(tmp_path / "a", *run, "trainer.max_steps=8"))
    stopped = config(tmp_path / "b", *run, "trainer.max_steps=6")
    part = txtrain.train(stopped)
    txtrain.train(dc.replace(stopped, trainer=dc.replace(stopped.trainer, max_steps=8)))
    assert metrics(part.run_dir) == metrics(whole.run_dir)
    assert kl(whole.run_dir)[4] == pytest.approx(0, abs=1e-9)
    assert min(kl(whole.run_dir)[3], kl(whole.run_dir)[5]) > 1e-6
    assert part.run_dir is not None
    assert {name.count("lora") for name in weights(part.run_dir) if name.startswith("reference")} == {1}
    with pytest.raises(ConfigError, match=r"`adapter.lora_dropout` must be 0"):
        config(tmp_path, *run, "adapter.lora_dropout=0.1")


@pytest.mark.slow
def test_micro_batches_and_padding_change_neither_rollouts_nor_gradients(tmp_path: Path) -> None:
    whole = txtrain.train(config(tmp_path / "a", "trainer.max_steps=4", "objective.mask_truncated=true"))
    parts = txtrain.train(
        config(tmp_path / "b", "trainer.max_steps=4", "objective.mask_truncated=true", "data.micro_batch_size=3", "data.global_batch_size=12",
               "objective.prompts_per_rollout=3")
    )
    small = txtrain.train(
        config(tmp_path / "c", "trainer.max_steps=4", "objective.mask_truncated=true", "data.global_batch_size=12", "objective.prompts_per_rollout=3")
    )
    assert metrics(whole.run_dir)[0]["reward"] != metrics(parts.run_dir)[0]["reward"]
    for one, other in zip(metrics(parts.run_dir), metrics(small.run_dir), strict=True):
        assert one["reward"] == other["reward"]
        assert float(one["grad_norm"]) == pytest.approx(float(other["grad_norm"]), abs=1e-5)


def batch_of(n: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 257, (n, 12), generator=generator)
    labels = ids.clone()
    labels[:, :4] = -100
    for i in range(n):
        labels[i, 6 + i :] = -100
    labels[2] = -100  # masked: truncated
    old = torch.full((n, 12), -5.5) + torch.randn(n, 12, generator=generator) * 0.2
    return {
        "input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids), "old_log_probs": old,
        "advantages": torch.randn(n, generator=generator, dtype=torch.float64), "reference_log_probs": old - 0.1,
    }


@pytest.mark.parametrize("normalise", ["sequence", "token", "constant"])
@pytest.mark.parametrize("how", [(), ("objective.temperature=0.7", "objective.top_p=0.9"), ("objective.ratio=sequence", "objective.loss=cispo")])
def test_the_loss_of_micro_batches_is_that_of_rows_one_by_one(tmp_path: Path, normalise: str, how: tuple[str, ...]) -> None:
    """With padding and a truncated row; its denominator is that of the whole batch."""
    made = config(tmp_path, f"objective.normalise={normalise}", "objective.beta=0.1", "objective.reference=x", *how)
    objective, batch = build_objective(made), batch_of()
    seed_everything(0)
    model = build_model(made.model).double()
    counts = objective.denominators(batch)

    def gradient(parts: Sequence[Batch]) -> tuple[float, torch.Tensor]:
        model.zero_grad()
        value = sum((objective.total(objective(model, part, counts)) for part in parts), start=torch.zeros(()).double())
        value.backward()
        return float(value), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    (whole, of_whole), (apart, of_parts) = gradient([batch]), gradient([*cut(batch, 4)])
    rows = []
    for i in (0, 1, 3, 4, 5):  # without padding, and without the masked row
        rows.append({name: value[i : i + 1, : 6 + i] if value.ndim == 2 else value[i : i + 1] for name, value in batch.items()})
    one_by_one, of_rows = gradient(rows)
    assert whole == pytest.approx(apart, abs=1e-6)
    assert whole == pytest.approx(one_by_one, abs=1e-6)
    assert float((of_whole - of_parts).abs().max()) < 1e-6
    assert float((of_whole - of_rows).abs().max()) < 1e-6


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_balance_of_experts_weighs_the_same_in_any_micro_batch(tmp_path: Path, temperature: float) -> None:
    """Each micro-batch is evened out by itself: so that all are alike, one row is repeated."""
    made = config(
        tmp_path, "model/ffn=moe_softmax", "model.ffn.n_experts=4", "model.ffn.top_k=2", "model.ffn.aux_weight=1",
        "objective.beta=0.1", "objective.reference=x", f"objective.temperature={temperature}",
    )
    objective = build_objective(made)
    seed_everything(0)
    model = build_model(made.model).double().train()
    batch = {name: value[1:2].expand(8, *value.shape[1:]) for name, value in batch_of().items()}
    found = []
    for size in (8, 4, 1):
        model.zero_grad()
        for part in cut(batch, size):
            objective.total(objective(model, part, objective.denominators(batch))).backward()  # type: ignore[no-untyped-call]
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert float((found[1] - found[0]).abs().max()) < 1e-6
    assert float((found[2] - found[0]).abs().max()) < 1e-6


def by_hand(model: torch.nn.Module, batch: Batch, ratio: str, normalise: str) -> torch.Tensor:
    """GRPO's loss of a whole batch, a token at a time, from the model's logits; clip 0.2, beta 0.1, at most 6 tokens."""
    log_p = model(input_ids=batch["input_ids"]).logits.log_softmax(-1)
    total, rows, tokens = torch.zeros((), dtype=torch.float64), 0, 0
    for i, labels in enumerate(batch["labels"].tolist()):
        places = [t for t, label in enumerate(labels) if label != -100]
        rows, tokens = rows + bool(places), tokens + len(places)
        old, reference, a = batch["old_log_probs"][i], batch["reference_log_probs"][i], float(batch["advantages"][i])
        apart = [log_p[i, t - 1, labels[t]] - old[t] for t in places]
        for t, log_r in zip(places, apart, strict=True):
            r = torch.exp(sum(apart, torch.zeros(())) / len(apart) if ratio == "sequence" else log_r)
            further = reference[t] - log_p[i, t - 1, labels[t]]
            loss = -torch.min(r * a, r.clamp(0.8, 1.2) * a) + 0.1 * (further.exp() - further - 1)
            total = total + loss * {"sequence": 1 / len(places), "token": 1.0, "constant": 1 / 6}[normalise]
    return total / (tokens if normalise == "token" else rows)


@pytest.mark.parametrize("normalise", ["sequence", "token", "constant"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_what_an_adapter_learns_on_two_ranks_in_micro_batches_equals_the_formula(tmp_path: Path, normalise: str, ratio: str) -> None:
    """Ranks' denominators are summed, and their gradients; rows are padded, and one is masked out as truncated."""
    made = config(tmp_path, f"objective.normalise={normalise}", f"objective.ratio={ratio}", "objective.beta=0.1", "objective.reference=x")
    objective, batch = build_objective(made), batch_of()
    seed_everything(0)
    model = build_model(made.model).double()
    attach(model, {"blocks.0.attention.q_proj": (4, 2.0), "blocks.0.ffn.up_proj": (4, 2.0)})
    for name, p in model.named_parameters():
        p.requires_grad_("lora" in name)
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    trained = [p for p in model.parameters() if p.requires_grad]
    ranks = list(cut(batch, 3))
    counts = {name: sum(n[name] for n in map(objective.denominators, ranks)) for name in objective.denominators(batch)}
    value = 0.0
    for rank in ranks:
        for part in cut(rank, 2):
            loss = objective.total(objective(model, part, counts))  # type: ignore[arg-type]
            loss.backward()  # type: ignore[no-untyped-call]
            value += float(loss.detach())
    wanted = by_hand(model, batch, ratio, normalise)
    gradients = torch.autograd.grad(wanted, trained)
    assert value == pytest.approx(float(wanted.detach()), abs=1e-6)
    assert max(float((p.grad - g).abs().max()) for p, g in zip(trained, gradients, strict=True) if p.grad is not None) < 1e-6
    assert len(gradients) == 4 and max(float(g.abs().max()) for g in gradients) > 1e-3  # noqa: PT018


def test_log_probs_are_those_of_the_sampler_at_its_temperature_and_nucleus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In bfloat16 they need not be: a difference above a bound, here 0, is said, once."""
    monkeypatch.setattr("txtrain.objectives.grpo._BOUND", 0.0)
    made = config(tmp_path, "objective.temperature=0.7", "objective.top_p=0.8", "trainer.max_steps=2")
    rows = metrics(txtrain.train(made).run_dir)
    assert all(float(row["sampler_difference_max"]) < 1e-5 for row in rows)
    assert caplog.text.count("sampler and trainer differ by") == 1


@pytest.mark.parametrize("how", [(), ("objective.temperature=0.7", "objective.top_p=0.8")])
def test_without_a_cache_sampler_and_trainer_differ_by_exactly_nothing(tmp_path: Path, how: tuple[str, ...]) -> None:
    debug = "objective.use_cache=false", "data.micro_batch_size=1", "objective.prompts_per_rollout=8", "objective.updates_per_rollout=2"
    rows = metrics(txtrain.train(config(tmp_path, *debug, *how, "trainer.max_steps=4")).run_dir)
    assert [float(row["sampler_difference_max"]) for row in rows] == [0] * 4
    assert [float(row["ratio_deviation"]) == 0 for row in rows] == [True, False, True, False]  # of a rollout the first update


def test_a_batch_of_truncated_completions_alone_has_loss_0_and_no_gradient(tmp_path: Path) -> None:
    made = config(tmp_path)
    objective, batch = build_objective(made), batch_of()
    assert isinstance(objective, GRPO)
    batch["labels"][:] = -100
    model = build_model(made.model)
    counts = {name: n.clamp(min=1) for name, n in objective.denominators(batch).items()}
    loss = objective.total(objective(model, batch, counts))
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss) == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["objective.reference=x"], "`objective.reference` must be null with objective.beta=0"),
        (["objective.loss=rloo", "objective.updates_per_rollout=2"], "which has no ratio"),
        (["objective.loss=rloo", "objective.clip_low=0.3"], "`objective.clip_low` must be 0.2 with objective.loss=rloo"),
        (["objective.loss=reinforce", "objective.clip_high=0.3"], "`objective.clip_high` must be 0.2 with objective.loss=reinforce"),
        (["objective.prompts_per_rollout=3"], "`data.global_batch_size` must divide the 12 completions"),
        (["objective.prompts_per_rollout=8"], "`objective.updates_per_rollout` must be a multiple of 2"),
        (["objective.max_new_tokens=16"], "must be below data.seq_len"),
        (["model.dropout=0.1"], "`model.dropout` must be 0"),
        (["objective.use_cache=false"], "`data.micro_batch_size` must be 1 with objective.use_cache=false"),
        (["objective.use_cache=false", "model/ffn=moe"], "`objective.use_cache` must be true for a model with experts"),
        (["objective.reference_reset=2"], "`objective.reference_reset` must be null with objective.beta=0, but is 2 instead."),
        ([*RESET[:2], "objective.reference_reset=3"], "must be a multiple of objective.updates_per_rollout (2)"),
        (["trainer.devices=8"], "`objective.prompts_per_rollout` must be a multiple of the 8 ranks"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(tmp_path: Path, wrong: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as e:
        config(tmp_path, *wrong)
    assert said in str(e.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["objective=grpo", "objective.beta=0", "data=python_docs"], "there must be questions, and answers that can be"),
        (["data=arithmetic"], "`data` must be a source of text or chat with objective=causal_lm"),
    ],
)
def test_problems_and_grpo_go_together(wrong: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as e:
        compose(["model=llama2", "trainer.max_epochs=null", *wrong])
    assert said in str(e.value)


def test_a_divergence_in_the_reward_has_the_gradient_of_the_divergence(tmp_path: Path) -> None:
    """The expected gradient of a policy of two tokens, far from its reference; a completion is a token."""
    made = config(tmp_path, "objective.beta=0.5", "objective.kl_in=reward", "objective.group_size=2", "objective.loss=reinforce")
    theta, reference = torch.tensor([1.5, -0.5], requires_grad=True), torch.tensor([0.1, 0.9]).log()
    log_p = theta.log_softmax(0)
    row = {"ids": [0, 0], "n_prompt": 1, "ended": True, "rewards": [0.0], "total": 0.0}
    rows = [
        row | {"old": log_p[i : i + 1].detach(), "sampler": log_p[i : i + 1].detach(), "reference": reference[i : i + 1]}
        for i in range(2)
    ]
    advantages = build_objective(made)._together(rows)["advantages"]  # type: ignore[attr-defined]
    (found,) = torch.autograd.grad((log_p.exp().detach() * advantages * log_p).sum(), theta, retain_graph=True)
    (wanted,) = torch.autograd.grad(-0.5 * (log_p.exp() * (log_p - reference)).sum(), theta)
    assert torch.allclose(found, wanted, atol=1e-6), (found, wanted)


@pytest.mark.slow
def test_the_reference_is_read_and_its_divergence_counts(tmp_path: Path) -> None:
    start = txtrain.train(config(tmp_path / "start", "trainer.max_steps=2"))
    for kl_in in ("loss", "reward"):
        given = [f"init_from={start.run_dir}", "objective.beta=0.1"]
        given += [f"objective.reference={start.run_dir}"] if kl_in == "loss" else []  # else the weights of the start
        rows = metrics(txtrain.train(config(tmp_path / kl_in, *given, f"objective.kl_in={kl_in}", "trainer.max_steps=4")).run_dir)
        assert float(rows[0]["kl"]) == pytest.approx(0, abs=1e-9)
        assert float(rows[3]["kl"]) > 1e-4
        same = float(rows[3]["reward"]) == pytest.approx(float(rows[3]["reward/low"]))
        assert same == (kl_in == "loss")


LOW = """
import txtrain

@txtrain.component("reward", "low")
def low(prompts, completions, samples):
    return [sum(ord(c) < 64 for c in text) / 6 for text in completions]
"""
KILLED = """
import os, pathlib, signal
from txtrain.objectives import grpo, rewards

def dying(f, n):
    def call(*args, **how):
        made = f(*args, **how)
        marker = pathlib.Path({marker!r})
        calls.append(1)
        if len(calls) == n and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return made
    calls = []
    return call

{where} = dying({where}, {n})
"""


def ran(folder: Path, *overrides: str, code: str = LOW, steps: int = 10) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """Ten updates of five rollouts, until they are complete: metrics, and the last rollout with the weights."""
    folder.mkdir(exist_ok=True)
    (folder / "mine.py").write_text(code)
    run = [*SHAPE, f"data.cache_dir={folder.parent / 'cache'}", f"run_dir={folder / 'run'}", f"imports=[{folder / 'mine.py'}]"]
    run += [f"trainer.max_steps={steps}", *RESET, "trainer.val_check_interval=5", *overrides]
    for _ in range(2):
        done = subprocess.run([sys.executable, "-m", "txtrain", *run], check=False, timeout=400, capture_output=True, text=True)
        if done.returncode != -9:
            break
    assert done.returncode == 0, done.stderr
    with np.load(folder / "run" / "checkpoints" / f"step_{steps:08}" / "rollout.npz") as file:
        held = {name: p.detach().numpy() for name, p in txtrain.load_pretrained(folder / "run").named_parameters()}
        return metrics(folder / "run"), {**file, **held}


@pytest.fixture(scope="module")
def of_one_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, str]], dict[str, Any]]:
    return ran(tmp_path_factory.mktemp("one") / "1")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "n"),
    [
        ("ddp", 2), ("ddp", 4), ("fsdp", 2), ("deepspeed_stage_1", 2), ("deepspeed_stage_2", 2), ("deepspeed_stage_3", 2), ("tp", 2),
        ("hsdp", 4), ("fsdp_tp", 4),
    ],
)
def test_several_processes_make_the_rollouts_and_updates_of_one(tmp_path: Path, of_one_process: Any, strategy: str, n: int) -> None:
    if strategy.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    assert_near(of_one_process, ran(tmp_path / "n", f"strategy={strategy}", f"trainer.devices={n}"))


def assert_near(whole: tuple[Any, Any], other: tuple[Any, Any]) -> None:
    (one, of_one), (several, of_several) = whole, other
    assert np.array_equal(of_one["input_ids"], of_several["input_ids"])
    for name in of_one:
        assert np.allclose(of_one[name], of_several[name], atol=1e-4), name
    assert [float(row["grad_norm"]) for row in one] == pytest.approx([float(row["grad_norm"]) for row in several], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed_stage_2", "deepspeed_stage_3", "tp"])
def test_a_reset_reference_moves_to_another_number_of_processes(tmp_path: Path, of_one_process: Any, strategy: str) -> None:
    """Reset at 4 by two processes, read at 6 by one, reset at 8."""
    if strategy.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    ran(tmp_path / "n", f"strategy={strategy}", "trainer.devices=2", steps=6)
    assert_near(of_one_process, ran(tmp_path / "n"))


@pytest.fixture(scope="module")
def of_one_adapter(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Any]:
    """Its overrides, and its result on one process."""
    folder = tmp_path_factory.mktemp("adapter")
    ran(folder / "base", steps=2)
    run = [f"init_from={folder / 'base' / 'run'}", "adapter=lora", "adapter.r=4"]
    return run, ran(folder / "1", *run)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "deepspeed_stage_2", "deepspeed_stage_3"])
def test_an_adapter_and_its_reset_reference_stopped_and_continued_on_two_processes(tmp_path: Path, of_one_adapter: Any, strategy: str) -> None:
    if strategy.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    run, one = of_one_adapter
    two = *run, f"strategy={strategy}", "trainer.devices=2"
    ran(tmp_path / "n", *two, steps=6)
    assert_near(one, ran(tmp_path / "n", *two))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "n"), [("grpo.continue_rows", 4), ("rewards.Rewards.__call__", 4), ("grpo.GRPO.__call__", 6), ("grpo.GRPO.__call__", 7)]
)
def test_a_kill_in_a_rollout_its_rewards_or_an_update_changes_nothing(tmp_path: Path, of_one_process: Any, where: str, n: int) -> None:
    """The last two: within a rollout that a checkpoint has, and within one that none has."""
    marker = tmp_path / "died"
    code = LOW + KILLED.format(where=where, n=n, marker=str(marker))
    (rows, of_one), (again, of_again) = of_one_process, ran(tmp_path / "killed", "save.every_n_steps=3", code=code)
    assert marker.exists()
    assert again == rows
    for name in of_one:
        assert np.array_equal(of_one[name], of_again[name]), name

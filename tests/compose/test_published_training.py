"""A published size brings its paper's training values; keys, groups and recipes win over them."""

import dataclasses as dc

import pytest

import txtrain
from txtrain.cli.main import main
from txtrain.errors import ConfigError

M, B, T = 10**6, 10**9, 10**12


@dc.dataclass(frozen=True)
class Paper:
    """batch: sequences x their length, or images. end: the key of TrainerConfig and its value."""

    lr: float
    batch: tuple[int, int | None]
    schedule: tuple[str, int, float]  # type, warm-up, lowest share
    end: tuple[str, int]
    optimizer: str = "adamw"
    betas: tuple[float, float] | None = (0.9, 0.95)
    eps: float | tuple[float, float] = 1e-8
    decay: float = 0.1
    clip: float | None = 1.0
    precision: str = "bf16-mixed"


TRANSFORMER = Paper(  # 5.3: dim^-0.5 * 4000^-0.5 at its peak; 5.1: 25,000 tokens a side, here in rows of 512; 5.2: 100,000 steps
    (512 * 4000) ** -0.5, (48, 512), ("inverse_sqrt", 4000, 0.0), ("max_steps", 100_000), "adam", (0.9, 0.98), 1e-9, 0.0, None, "32-true"
)
GPT1 = Paper(2.5e-4, (64, 512), ("cosine", 2000, 0.0), ("max_epochs", 100), betas=(0.9, 0.999), decay=0.01, precision="32-true")
BERT = Paper(1e-4, (256, 512), ("linear", 10_000, 0.0), ("max_steps", 1_000_000), betas=(0.9, 0.999), eps=1e-6, decay=0.01, precision="32-true")
GPT2 = Paper(6e-4, (512, 1024), ("cosine", round(375 * M / (512 * 1024)), 0.1), ("max_tokens", 300 * B))
T5 = Paper(
    10_000**-0.5, (2**11, 512), ("inverse_sqrt", 0, 0.0), ("max_steps", 1_000_000), "adafactor", None, (1e-30, 1e-3), decay=0.0, clip=None
)
VIT = Paper(8e-4, (4096, None), ("linear", 10_000, 0.0), ("max_epochs", 7), betas=(0.9, 0.999), clip=None, precision="32-true")
LLAMA2 = Paper(3e-4, (2**22 // 4096, 4096), ("cosine", 2000, 0.1), ("max_tokens", 2 * T), eps=1e-5)
LLAMA2_70B = dc.replace(LLAMA2, lr=1.5e-4)
LONG = (2**22 // 8192, 8192)
PAPERS = {
    "transformer_base": TRANSFORMER,
    "transformer_big": dc.replace(TRANSFORMER, lr=(1024 * 4000) ** -0.5, end=("max_steps", 300_000)),
    "gpt1_base": GPT1,
    "bert_base": BERT,
    "bert_large": BERT,
    "gpt2_small": GPT2,
    "gpt2_medium": dc.replace(GPT2, lr=3e-4),
    "gpt2_large": dc.replace(GPT2, lr=2.5e-4),
    "gpt2_xl": dc.replace(GPT2, lr=2e-4),
    **dict.fromkeys(("t5_small", "t5_base", "t5_large", "t5_3b", "t5_11b"), T5),
    **dict.fromkeys(("t5_v1_1_small", "t5_v1_1_base", "t5_v1_1_large", "t5_v1_1_xl", "t5_v1_1_xxl"), T5),
    "vit_b16": VIT,
    "vit_l16": dc.replace(VIT, lr=4e-4, end=("max_epochs", 14)),
    "vit_h14": dc.replace(VIT, lr=3e-4, end=("max_epochs", 14)),
    "llama2_7b": LLAMA2,
    "llama2_13b": LLAMA2,
    "llama2_70b": LLAMA2_70B,
    "mistral_7b": dc.replace(LLAMA2, batch=LONG),
    "gemma_2b": dc.replace(LLAMA2, batch=LONG, end=("max_tokens", 3 * T)),
    "gemma_7b": dc.replace(LLAMA2, batch=LONG, end=("max_tokens", 6 * T)),
    "gemma2_2b": dc.replace(LLAMA2, batch=LONG, end=("max_tokens", 2 * T)),
    "gemma2_9b": dc.replace(LLAMA2, batch=LONG, end=("max_tokens", 8 * T)),
    "gemma2_27b": dc.replace(LLAMA2_70B, batch=LONG, end=("max_tokens", 13 * T)),
    "deepseek_r1_671b": Paper(2.2e-4, (15_360, 4096), ("wsd", 2000, 0.1), ("max_tokens", 148 * T // 10)),
}
FEW = ("transformer_base", "t5_3b", "vit_l16", "llama2_70b", "deepseek_r1_671b")


def test_every_published_size_has_a_row():
    sizes = {name for name in txtrain.families() for family in [name.rpartition("_")[0]] if family in txtrain.families()} - {"t5_v1_1"}
    assert sizes == PAPERS.keys()


@pytest.mark.parametrize("name", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in PAPERS])
def test_a_published_size_trains_as_its_paper_says(name, job):
    paper = PAPERS[name]
    kind = ("data=text", "data.path=x") if paper.batch[1] else ()
    if name.startswith("transformer"):
        kind = ("data=translation", "data.path=x", "data.seq_len=512")
    made = job(f"model={name}", *kind)
    config, optimizer, scheduler, trainer = made.config, made.config.optimizer, made.config.scheduler, made.config.trainer
    assert optimizer.lr == pytest.approx(paper.lr, rel=1e-12)
    assert (optimizer.type, optimizer.eps, optimizer.weight_decay) == (paper.optimizer, paper.eps, paper.decay)
    assert paper.betas is None or optimizer.betas == paper.betas
    assert (scheduler.type, scheduler.warmup_steps, scheduler.min_lr_ratio) == paper.schedule
    assert (trainer.gradient_clip_val, trainer.precision) == (paper.clip, paper.precision)
    ends = {key: value for key in ("max_steps", "max_epochs", "max_tokens", "max_time") if (value := getattr(trainer, key)) is not None}
    assert ends == dict([paper.end])
    assert (config.data.global_batch_size, config.seq_len if paper.batch[1] else None) == paper.batch
    (note,) = made.notes
    assert note.startswith(f"training values of the published {name} (conf/training/")
    assert "published: " not in note, "all of it holds"


def test_what_else_the_papers_say(job):
    assert job("model=transformer_base").config.objective.label_smoothing == 0.1
    assert job("model=t5_base").config.scheduler.timescale == 10_000
    assert job("model=bert_base").config.optimizer.no_decay == ("norm", "bias"), "embeddings decay too"
    deepseek = job("model=deepseek_r1_671b").config.scheduler
    assert (deepseek.decay_type, round(deepseek.decay_ratio * 14.8, 9)) == ("cosine", 4.8)


def test_a_laptop_size_keeps_its_own(job):
    made = job("model=llama2")
    assert (made.config.optimizer.lr, made.config.trainer.max_steps, made.config.data.global_batch_size, made.notes) == (1e-3, 600, 8, ())


def test_a_batch_of_tokens_follows_the_length(job):
    def batch(*more: str) -> int:
        return job("model=llama2_7b", "data=text", "data.path=x", *more).config.data.global_batch_size

    assert batch("data.seq_len=2048") == 2048
    assert batch("data.seq_len=100") == 41_944, "a multiple of eight"
    assert batch("data.seq_len=2000000") == 2, "there are no eight"
    assert batch("data.seq_len=2048", "data.global_batch_size=16") == 16
    with pytest.raises(ConfigError, match=r"`data\.seq_len` must be an integer or null, but is 'long' instead"):
        batch("data.seq_len=long")


def test_keys_of_the_command_line_win_and_the_screen_says_so(job, capsys):
    made = job("model=llama2_7b", "optimizer.lr=1e-4", "trainer.max_steps=10")
    assert (made.config.optimizer.lr, made.config.optimizer.eps, made.config.trainer.max_steps) == (1e-4, 1e-5, 10)
    assert "; not optimizer.lr=0.0001 (published: 0.0003), trainer.max_steps=10 (published: null)." in made.notes[0]
    assert main(["plan", "model=llama2_7b", "optimizer.lr=1e-4"]) == 0
    second = capsys.readouterr().out.splitlines()[1]
    assert second.startswith("training values of the published llama2_7b (conf/training/llama2.yaml): adamw at 0.0001")
    assert "1,024 x 4,096 = 4,194,304 tokens a step" in second


def test_a_group_of_the_command_line_wins_whole(job):
    config = job("model=llama2_7b", "optimizer=lion", "trainer=short").config
    assert (config.optimizer.type, config.optimizer.lr, config.optimizer.betas) == ("lion", 1e-4, (0.9, 0.99))
    assert (config.trainer.max_steps, config.trainer.max_tokens, config.trainer.precision) == (400, None, "32-true")
    assert (config.scheduler.warmup_steps, config.data.global_batch_size) == (2000, 1024), "what was not chosen stays"
    same = job("model=llama2_7b", "optimizer=adamw", "scheduler=cosine").config
    assert (same.optimizer.lr, same.scheduler.warmup_steps) == (1e-3, 50), "also the option that the paper has"
    assert job("model=transformer_base", "objective=seq2seq").config.objective.label_smoothing == 0.0
    merged = job("model=llama2_7b", "trainer={max_steps: 7}").config.trainer
    assert (merged.max_steps, merged.precision) == (7, "bf16-mixed"), "values of a group, not the group"


def test_a_recipe_wins(job, clean_room):
    (clean_room / "recipes").mkdir()
    (clean_room / "recipes" / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [override /model: llama2_7b, override /scheduler: constant]\noptimizer: {lr: 2e-5}\ndata: {global_batch_size: 24}\n"
    )
    config = job("recipe=mine", config_dir=clean_room).config
    assert (config.optimizer.lr, config.optimizer.eps, config.data.global_batch_size) == (2e-5, 1e-5, 24)
    assert (config.scheduler.type, config.scheduler.warmup_steps) == ("constant", 50)
    assert config.trainer.precision == "bf16-mixed"

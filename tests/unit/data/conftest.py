"""A run's config without the command line, small and in a temporary cache."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.models import tiny
from txtrain.config.schema import Train
from txtrain.data.sources import hub
from txtrain.objectives.config import CausalLMConfig, Seq2SeqConfig
from txtrain.optim.config import AdamConfig, SchedulerConfig
from txtrain.parallel.config import StrategyConfig
from txtrain.registry import TABLE
from txtrain.run_config import SampleConfig, SaveConfig, TrainerConfig

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TXTRAIN_CACHE", str(tmp_path / "cache"))
    for name in ("WORLD_SIZE", "SLURM_JOB_ID", "TOKENIZERS_PARALLELISM"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub that refuses at once, and an empty cache of it."""
    import datasets.config
    from huggingface_hub import constants

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    hub.why_unreachable.cache_clear()
    hub.load_dataset.cache_clear()
    yield
    hub.why_unreachable.cache_clear()
    hub.load_dataset.cache_clear()


@pytest.fixture
def make_config() -> Callable[..., Train]:
    """make_config("text", {"path": ...}, vocab_size=300, trainer={...}): keys of data, then others."""

    def make(kind: str, data: dict[str, Any] | None = None, *, vocab_size: int = 512, trainer: dict[str, Any] | None = None, **top: Any) -> Train:
        option = TABLE["data"][kind].config
        pairs = option.sample_kind == "pairs"
        topology = "encoder_decoder" if pairs else "decoder"
        model = tiny(vocab_size=vocab_size, size=top.pop("size", "laptop"), topology=topology)
        keys = {"type": kind, "seq_len": 16, "global_batch_size": 4, "tokenizer": "bytes", **(data or {})}
        return Train(
            model=model,
            data=option(**keys),
            objective=Seq2SeqConfig(type="seq2seq") if pairs else CausalLMConfig(type="causal_lm"),
            optimizer=AdamConfig(type="adamw"),
            scheduler=SchedulerConfig(type="constant"),
            strategy=StrategyConfig(type="auto"),
            trainer=TrainerConfig(**{"max_steps": 10, "accelerator": "cpu", **(trainer or {})}),
            save=SaveConfig(),
            sample=SampleConfig(),
            logger={},
            callbacks={},
            **top,
        )

    return make


@pytest.fixture
def corpus_file(tmp_path: Path) -> Path:
    """40 lines, each telling its number."""
    path = tmp_path / "corpus.txt"
    path.write_text("".join(f"line {i} of the corpus says {i * i}\n" for i in range(40)))
    return path


@pytest.fixture
def own_axis() -> Iterator[None]:
    """Take back what a test registers."""
    before = dict(TABLE["data"])
    yield
    TABLE["data"].clear()
    TABLE["data"].update(before)

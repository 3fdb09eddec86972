import dataclasses as dc
import io
from types import SimpleNamespace

from rich.console import Console

from tests.training import tiny
from txtrain import screen
from txtrain.composition import compose
from txtrain.limits import Limits
from txtrain.progress import Display


def data():
    return SimpleNamespace(tokenizer=SimpleNamespace(vocab_size=257), source="three files", n_train=100, n_val=9)


def test_the_first_line_says_the_size_and_the_published_one():
    config = compose(["model=mistral"])
    (line,) = screen.opening(config, None)
    assert line == f"mistral, laptop size: {screen.count(config.model.n_params)} parameters; published: mistral_7b 7.24 B"
    assert screen.opening(config, "no hub")[1].startswith("STAND-IN DATA: no hub")


def test_the_table_says_axes_batch_budget_and_folder(tmp_path):
    config = tiny(tmp_path, "model/attention=gqa", "model.attention.n_kv_heads=1", "data.micro_batch_size=2")
    shown = "\n".join(screen.table(config, data(), Limits(12, None), "CPU; MFU against 1 GFLOP/s", None, {}, "auto, one process"))
    for text in (
        "gqa, n_kv_heads=1",
        "8 sequences x 32 = 256 tokens, in 4 micro-batches of 2",
        "12 steps, 3.07 k tokens, 0.96 epochs",
        "three files; 100 training and 9 validation sequences of 32 tokens",
        "MFU against 1 GFLOP/s",
        "none: trainer.fast_dev_run writes nothing",
    ):
        assert text in shown, shown


def test_grafts_are_told_with_what_they_do_to_the_number_of_parameters(tmp_path):
    model = compose(["model=mistral", "model/attention=mqa"]).model
    grafts = {"attention": {"from": "gqa", "to": "mqa", "kept": {"window": 64}, "dropped": {"n_kv_heads": 2}}}
    first, second = screen.graft_lines(model, grafts)
    assert first == "attention: gqa -> mqa; kept window=64; dropped n_kv_heads=2"
    fewer = compose(["model=mistral"]).model.n_params - model.n_params
    assert second == f"-{fewer:,} parameters ({-fewer / (model.n_params + fewer):+.1%}) to mistral of this shape without it"


def test_without_a_terminal_rows_are_time_stamped_lines():
    out = io.StringIO()
    display = Display(Console(file=out, highlight=False, soft_wrap=True))
    display.start(0, total=600)
    row = {"step": 10, "tokens": 20480, "loss": 5.25, "lr": 1e-3, "tokens_per_second": 2048.0, "mfu": 0.41, "seconds": 10.0, "val_loss": 5.0, "perplexity": 148.41}  # noqa: E501
    display.row(row)
    first, second = out.getvalue().splitlines()
    assert first[8:] == "  step 10/600  loss 5.2500  lr 1.00e-03  2,048 tokens/s  MFU 41.0%  9 min 50 s left"
    assert second[8:] == "  step 10  validation loss 5.0000  perplexity 148.41"


def test_on_a_terminal_there_is_one_bar():
    out = io.StringIO()
    display = Display(Console(file=out, force_terminal=True, width=120, highlight=False))
    display.start(5, total=20)
    display.step(6)
    display.row({"step": 6, "tokens": 600, "loss": 5.25, "lr": 1e-3, "tokens_per_second": 100.0, "mfu": None, "seconds": 6.0})
    display.stop()
    assert "step 6/20" in out.getvalue()
    assert "loss 5.2500" in out.getvalue()
    assert "14 s left" in out.getvalue()


def test_numbers_are_short():
    assert [screen.count(n) for n in (999, 4_096, 5_320_000, 7_241_732_096)] == ["999", "4.1 k", "5.32 M", "7.24 B"]
    assert [screen.duration(s) for s in (3.2, 200, 3720)] == ["3 s", "3 min 20 s", "1 h 02 min"]


def test_a_time_limit_alone_is_a_budget(tmp_path):
    config = tiny(tmp_path)
    config = dc.replace(config, trainer=dc.replace(config.trainer, max_time="00:01:00:00"))
    assert screen.budget(config, Limits(None, 3600.0), 100) == "at most 00:01:00:00 (DD:HH:MM:SS)"


def test_eighty_columns_hold_the_bar_and_the_time_left():
    out = io.StringIO()
    display = Display(Console(file=out, force_terminal=True, width=80, color_system=None))
    display.start(0, 600)
    display.step(510)
    display.row({"step": 510, "tokens": 1, "loss": 12.3456, "lr": 1e-3, "tokens_per_second": 123456.0, "mfu": 0.41, "seconds": 3600.0})
    display.stop()
    last = [line for line in out.getvalue().replace("\r", "\n").splitlines() if "step 510/600" in line][-1]
    assert "loss 12.3456  123,456 tokens/s  MFU 41.0%  10 min 35 s left" in last
    assert "━" * 3 in last

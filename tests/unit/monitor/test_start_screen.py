import dataclasses as dc
import datetime
import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from tests.training import tiny
from txtrain import compose
from txtrain.cli.plan import flops, size
from txtrain.monitor import start_screen
from txtrain.monitor.console import Display


def data():
    return SimpleNamespace(tokenizer=SimpleNamespace(vocab_size=257), source="three files", n_train=100, n_val=9)


def test_the_first_line_says_the_size_and_the_published_one():
    config = compose(["model=mistral"])
    (line,) = start_screen.opening(config, None)
    assert line == f"mistral, laptop size: {start_screen.count(config.model.n_params)} parameters; published: mistral_7b 7.24 B"
    assert start_screen.opening(config, "no hub")[1].startswith("STAND-IN DATA: no hub")


def test_the_table_says_axes_batch_budget_and_folder(tmp_path):
    config = tiny(tmp_path, "model/attention=gqa", "model.attention.n_kv_heads=1", "data.micro_batch_size=2")
    rows = start_screen.table(config, data(), 12, "CPU; MFU against 1 GFLOP/s", None, {}, "auto, one process", (1_200_000, 5_300_000))
    shown = "\n".join(text for _, text in rows)
    for text in (
        "gqa, n_kv_heads=1",
        "8 sequences x 32 = 256 tokens: 4 micro-batches of 2",
        "12 steps, 3.07 k tokens, 0.96 epochs",
        "three files; 100 training and 9 validation sequences of 32 tokens",
        "MFU against 1 GFLOP/s",
        "none: trainer.fast_dev_run writes nothing",
    ):
        assert text in shown, shown


def test_a_vocabulary_that_the_tokenizer_does_not_fill_is_told_with_what_it_costs():
    config = compose(["model=gpt2", "data.tokenizer=bytes"])
    idle = config.model.n_params - compose(["model=gpt2", "model.vocab_size=257"]).model.n_params
    said = start_screen.vocabulary(config, 257)
    share = f"{idle:,} parameters ({idle / config.model.n_params:.0%})"
    assert said == f"bytes, 257 tokens of the model's 4,096; {share} are of the others: model.vocab_size=257 leaves them out"
    assert start_screen.vocabulary(config, 4000) == "bytes, 4,000 tokens"  # a table that was rounded up
    assert ": model" not in start_screen.vocabulary(dc.replace(config, init_from="x"), 257)  # its shape is given


def test_grafts_are_told_with_what_they_do_to_the_number_of_parameters(tmp_path):
    model = compose(["model=mistral", "model/attention=mqa"]).model
    grafts = {"attention": {"from": "gqa", "to": "mqa", "kept": {"window": 64}, "dropped": {"n_kv_heads": 2}}}
    first, second = start_screen.graft_lines(model, grafts)
    assert first == "attention: gqa -> mqa; kept window=64; dropped n_kv_heads=2"
    fewer = compose(["model=mistral"]).model.n_params - model.n_params
    assert second == f"-{fewer:,} parameters ({-fewer / (model.n_params + fewer):+.1%}) to mistral of this shape without it"


def test_what_a_model_wrote_cannot_steer_the_terminal():
    out = io.StringIO()
    Display(Console(file=out, highlight=False, soft_wrap=True)).text("a\x1b[2Jb\tü")
    assert out.getvalue() == "  a\\x1b[2Jb ü\n"


def test_without_a_terminal_rows_are_time_stamped_lines():
    out = io.StringIO()
    display = Display(Console(file=out, highlight=False, soft_wrap=True))
    display.start(0, total=600)
    row = {"step": 10, "tokens": 20480, "loss": 5.25, "lr": 1e-3, "tokens_per_second": 2048.0, "mfu": 0.41, "seconds": 10.0, "val_loss": 5.0, "perplexity": 148.41}
    display.row(row)
    first, second = out.getvalue().splitlines()
    datetime.datetime.strptime(first[:19], "%Y-%m-%d %H:%M:%S")  # the date too: a job runs over midnight
    assert first[19:] == "  step 10/600  loss 5.2500  lr 1.00e-03  2,048 tokens/s  MFU 41.0%  9 min 50 s left"
    assert second[19:] == "  step 10  validation loss 5.0000  perplexity 148.41"


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
    assert [start_screen.count(n) for n in (999, 4_096, 5_320_000, 7_241_732_096)] == ["999", "4.1 k", "5.32 M", "7.24 B"]
    assert [start_screen.count(n) for n in (999_499, 999_600, 2e15)] == ["999 k", "1 M", "2000 T"], "the next unit where it rounds to 1"
    assert [size(n) for n in (1000, 1010 * 2**20, 1023.9 * 2**20)] == ["1000 B", "1010 MiB", "1 GiB"]
    assert [flops(n) for n in (12.0, 5.32e9, 9.996e17, 9.996e20)] == ["12 FLOP", "5.32 GFLOP", "1 EFLOP", "1e+21 FLOP"]
    assert [start_screen.duration(s) for s in (3.2, 200, 3720)] == ["3 s", "3 min 20 s", "1 h 02 min"]


def test_a_time_limit_alone_is_a_budget(tmp_path):
    config = tiny(tmp_path)
    config = dc.replace(config, trainer=dc.replace(config.trainer, max_time="00:01:00:00"))
    assert start_screen.budget(config, None, 100) == "at most 00:01:00:00 (DD:HH:MM:SS)"


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


# ------------------------------------------------------------------------------------------------------------ the terminal

ROW = {"step": 510, "tokens": 1, "loss": 12.3456, "lr": 1e-3, "tokens_per_second": 123456.0, "mfu": 0.41, "seconds": 3600.0, "grad_norm": 1.5}
TIMES = {"time/data": 1.0, "time/forward_backward": 7.0, "time/optimizer": 2.0, "hfu": 0.5, "goodput": 0.9, "memory_gib": 1.5}


def shown(width=80, verbosity="normal", terminal=True, environment=None, **row):
    """What a run of one row prints."""
    out = io.StringIO()
    environment = {"TERM": "xterm-256color"} | (environment or {})
    console = Console(file=out, force_terminal=terminal, width=width, highlight=False, soft_wrap=True, _environ=environment)
    display = Display(console, verbosity=verbosity)
    display.line("gpt2, laptop size")
    display.table([("data", "a text " * 20 + "end"), ("step", "8 sequences")])
    display.start(0, 600)
    display.step(510)
    display.row(ROW | row)
    display.text("Once | upon a time")
    display.tell("step 511: the loss jumps")
    display.stop()
    display.table([("loss", "12.3456")])
    display.tell("done: runs/a")
    return out.getvalue()


def bar(text):
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n")
    return [line for line in plain.splitlines() if "step 510/600" in line][-1]


@pytest.mark.parametrize("width", [40, 50, 60, 70, 80, 120])
def test_the_bar_is_one_line_however_narrow_the_terminal(width):
    line = bar(shown(width))
    assert len(line) <= width
    assert "loss 12.3456" in line
    assert "━" * 5 in line
    assert ("left" in line) == (width >= 60)
    assert ("123,456 tokens/s" in line) == (width >= 70)


def test_on_a_terminal_a_long_value_goes_on_below_itself():
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown(60))
    first, second = [line for line in plain.splitlines() if "a text" in line][:2]
    assert first.index("a text") == len(second) - len(second.lstrip())
    assert "step  " in plain
    assert len(max(plain[: plain.index("8 sequences")].splitlines(), key=len)) <= 60


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"TERM": "unknown"}])
def test_a_terminal_that_cannot_move_its_cursor_gets_lines(environment):
    out = shown(environment=environment)
    assert "━" not in out
    assert "\x1b[" not in re.sub(r"\x1b\[[0-9;]*m", "", out), "the cursor is moved"
    assert "step 510/600  loss 12.3456  lr 1.00e-03  123,456 tokens/s  MFU 41.0%" in out


def test_no_color_leaves_none():
    coloured = shown()
    plain = shown(environment={"NO_COLOR": "1"})
    assert re.search(r"\x1b\[[0-9;]*3[0-9]", coloured)
    assert not re.search(r"\x1b\[(?:[0-9;]*;)?[349][0-9]", plain)


def test_quiet_says_what_must_be_known():
    for terminal in (True, False):
        lines = [line for line in shown(verbosity="quiet", terminal=terminal).splitlines() if line.strip()]
        assert [re.sub(r"^[-0-9]* ?[0-9:]{8}  ", "", line) for line in lines] == ["step 511: the loss jumps", "done: runs/a"]


def test_verbose_says_where_the_time_went():
    out = shown(verbosity="verbose", terminal=False, **TIMES)
    assert "step 510  gradient norm 1.500  data 10%  forward/backward 70%  optimizer 20%  HFU 50.0%  goodput 90.0%  memory 1.50 GiB" in out
    assert "gradient norm" not in shown(terminal=False, **TIMES)


def test_a_process_that_is_silent_prints_nothing():
    out = io.StringIO()
    display = Display(Console(file=out, quiet=True))
    display.start(0, 10)
    display.row(ROW)
    display.tell("x")
    display.table([("a", "b")])
    assert out.getvalue() == ""

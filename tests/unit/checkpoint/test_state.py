"""state.json as one typed object: what was written is what is read, of this format and of version 0.1.0's."""

import json

import pytest

from txtrain.checkpoint.state import FORMAT, LossState, RunState, check_format, read_state
from txtrain.errors import ConfigError

STATE = RunState(
    step=7,
    tokens=70,
    samples=14,
    seconds=1.5,
    losses=LossState(window=[2.0, 1.5], first=2.0, n_spikes=1),
    times={"data": 0.5},
    data_order_hash="a",
    data_fingerprint="b",
    stream_position=[1, 2, 3],
    samples_size=9,
    metrics={"val_loss": 3.0},
    open_row={"step": 7, "loss": 2.0, "mfu": None},
    save_seconds=0.25,
    skipped=(2, 1),
    optimizer={"w.beta": 0.5},
)
WRITTEN_BY_0_1_0 = {
    **{key: value for key, value in json.loads(STATE.to_json()).items() if key != "format"},
    "losses": {"window": [2.0, 1.5], "first": 2.0, "lowest": None, "n_spikes": 1, "far_off": 0, "in_spike": False},
}


def test_what_was_written_is_read(tmp_path):
    (tmp_path / "state.json").write_text(STATE.to_json())
    assert read_state(tmp_path / "state.json") == STATE
    assert json.loads(STATE.to_json())["format"] == FORMAT


def test_a_state_of_version_0_1_0_is_read(tmp_path):
    (tmp_path / "state.json").write_text(json.dumps(WRITTEN_BY_0_1_0))
    assert read_state(tmp_path / "state.json") == STATE


NUMBERS, TEXTS = ["step", "tokens", "samples", "samples_size"], ["data_order_hash", "data_fingerprint"]
WRONG = [
    *((key, value) for key in (*NUMBERS, *TEXTS, "seconds", "metrics") for value in (None, [])),
    *((key, -1) for key in NUMBERS), *(("stream_position", [1] * n) for n in (0, 2, 7, 9, 17)),
]


@pytest.mark.parametrize(("key", "value"), [*WRONG, *((key, "x") for key in (*NUMBERS, "seconds", "metrics"))])
def test_a_missing_or_wrong_value_is_named_with_its_file(tmp_path, key, value):
    raw = {**WRITTEN_BY_0_1_0, key: value}
    if value is None:
        del raw[key]
    file = tmp_path / "state.json"
    file.write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=f"{file}.*`{key}`"):
        read_state(file)


@pytest.mark.parametrize("number", [FORMAT + 1, 0, -1])
def test_a_newer_format_is_refused_by_its_number(tmp_path, number):
    file = tmp_path / "state.json"
    file.write_text(json.dumps({**WRITTEN_BY_0_1_0, "format": number}))
    with pytest.raises(ConfigError, match=f"`format` must be at most {FORMAT} .* but is {number} instead"):
        read_state(file)
    with pytest.raises(ConfigError, match=r"run\.json: `format`"):
        check_format({"format": number}, tmp_path / "run.json")

import pytest

from txtrain.monitor.metrics_csv import COLUMNS, MetricsFile, latest, read


def row(step, **more):
    return {"step": step, "tokens": step * 10, "loss": 1 / (step + 2), "lr": 1e-4, **more}


def test_floats_come_back_exactly_and_missing_values_are_empty(tmp_path):
    file = MetricsFile(tmp_path / "metrics.csv")
    file.write(row(1, loss=0.1 + 0.2, val_loss=None))
    file.close()
    (found,) = read(tmp_path / "metrics.csv")
    assert float(found["loss"]) == 0.1 + 0.2
    assert found["val_loss"] == found["mfu"] == ""
    assert tuple(found) == COLUMNS
    assert COLUMNS[:3] == ("step", "tokens", "loss")


@pytest.mark.parametrize("torn", ["", "4", "4,40,0.1", "4,40,0.1666,,,,0.0001,,,,"])
def test_a_resume_drops_later_rows_and_a_torn_line(tmp_path, torn):
    path = tmp_path / "metrics.csv"
    file = MetricsFile(path)
    for step in (1, 2, 3):
        file.write(row(step))
    file.close()
    with open(path, "a") as f:
        f.write(torn)
    file = MetricsFile(path, keep=2)
    assert file.latest["step"] == 2
    file.write(row(3, loss=9.0))
    file.close()
    assert [(int(r["step"]), float(r["loss"])) for r in read(path)] == [(1, 1 / 3), (2, 1 / 4), (3, 9.0)]


def test_a_new_run_starts_with_an_empty_file(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss\n1,2\n")
    MetricsFile(path).close()
    assert path.read_text() == ",".join(COLUMNS) + "\n"


def test_latest_is_the_last_value_of_each_column(tmp_path):
    file = MetricsFile(tmp_path / "metrics.csv")
    file.write(row(1, val_loss=5.0))
    file.write(row(2))
    file.close()
    assert latest(tmp_path / "metrics.csv") == file.latest
    assert (file.latest["step"], file.latest["val_loss"]) == (2, 5.0)

"""Which step W&B's files of a run end with: fragments over blocks, files that were cut."""

import struct
import threading
import zlib

import pytest
from wandb.proto.wandb_internal_pb2 import Record

from txtrain.monitor.loggers.offline import is_written, last_step, records


def log(contents):
    """The contents as a log: a record is cut where its block ends; a rest of a block that holds no header is zeros."""
    out = bytearray(b":W&B" + struct.pack("<HB", 0xBEE1, 0))
    for content in contents:
        first = True
        while True:
            room = 32768 - len(out) % 32768
            if room < 7:
                out += bytes(room)
                room = 32768
            piece, content = content[: room - 7], content[room - 7 :]
            kind = (1 if not content else 2) if first else (4 if not content else 3)
            out += struct.pack("<IHB", zlib.crc32(bytes([kind]) + piece), len(piece), kind) + piece
            first = False
            if not content:
                break
    return bytes(out)


@pytest.mark.parametrize("sizes", [[0, 1, 32747, 5], [32754, 3], [32748, 3], [100_000, 7, 70_000], [32760 - 7, 20_000, 20_000]])
def test_records_are_read_back_wherever_a_block_cuts_them(sizes):
    contents = [bytes([i + 1]) * size for i, size in enumerate(sizes)]
    assert list(records(log(contents))) == contents


def test_a_file_that_was_cut_ends_with_its_last_whole_record():
    whole = log([b"a" * 40_000, b"b" * 40_000])
    assert list(records(whole[:70_000])) == [b"a" * 40_000]
    assert list(records(whole[:65_536])) == [b"a" * 40_000]
    assert list(records(whole[:3])) == []


def row(step):
    record = Record()
    item = record.history.item.add()
    item.nested_key.append("_step")
    item.value_json = str(step)
    return record.SerializeToString()


def test_the_last_step_is_that_of_all_processes_of_the_run(tmp_path):
    for name, steps in {"offline-run-1-abc/run-abc": [1, 2, 7], "run-2-abc/run-abc": [3, 4], "offline-run-3-xyz/run-xyz": [99]}.items():
        file = tmp_path / f"{name}.wandb"
        file.parent.mkdir()
        file.write_bytes(log([*map(row, steps), Record(num=3).SerializeToString()]))
    assert last_step(tmp_path, "abc") == 7
    assert last_step(tmp_path, "none") is None


def test_a_file_is_written_when_the_runs_end_is_in_it(tmp_path):
    end = Record()
    end.exit.exit_code = 0
    whole = log([*map(row, range(1, 20_000)), end.SerializeToString(), Record(num=3).SerializeToString()])
    file = tmp_path / "run-abc.wandb"
    assert not is_written(file, patience=0)
    file.write_bytes(whole[:-20])
    assert not is_written(file, patience=0)
    later = threading.Timer(0.3, lambda: file.write_bytes(whole))
    later.start()
    assert is_written(file, patience=60)
    later.join()

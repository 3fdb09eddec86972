"""What libraries cannot log is said once."""

import logging

import pytest

from tests.unit.monitor.test_console import Full
from txtrain.monitor.loggers.records import failures_said_once


@pytest.fixture
def full(monkeypatch):
    """A logger of Python's own whose file is on a full disk."""
    monkeypatch.setattr(logging.Handler, "handleError", logging.Handler.handleError)
    handler, logger = logging.StreamHandler(Full()), logging.getLogger("of a library")
    logger.addHandler(handler)
    yield logger
    logger.removeHandler(handler)


def test_a_full_disk_under_a_librarys_log_is_said_once_and_counted(full, capfd):
    with failures_said_once():
        for _ in range(1000):
            full.error("x")
    full.error("while Python ends")
    first, last = capfd.readouterr().err.split("\n\n")
    assert first.strip() == (
        "txtrain: a log record of of a library could not be written ([Errno 28] No space left on device). "
        "The training goes on; further ones are only counted."
    )
    assert last.strip() == "txtrain: log records that could not be written: 1,000."


def test_where_nothing_fails_all_is_as_before():
    before = logging.Handler.handleError
    with failures_said_once():
        assert logging.Handler.handleError is not before
    assert logging.Handler.handleError is before

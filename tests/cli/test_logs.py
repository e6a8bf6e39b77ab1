"""Log lines of commands go to standard error, whatever that is at the time."""

import io
import logging
import sys

from qlora_kit.cli.logs import setup_logging


def test_a_stream_that_was_closed_since_is_not_written_to(monkeypatch):
    first, second = io.StringIO(), io.StringIO()
    logger = logging.getLogger("qlora_kit")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    monkeypatch.setattr(sys, "stderr", first)
    setup_logging()
    logger.info("one")
    assert first.getvalue() == "one\n"
    first.close()
    monkeypatch.setattr(sys, "stderr", second)
    logger.info("two")
    assert second.getvalue() == "two\n"

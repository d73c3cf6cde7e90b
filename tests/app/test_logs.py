"""Log lines name their request and are one JSON object each where asked."""

import json
import logging
from collections.abc import Iterator

import pytest

from app import logs
from app.settings import Settings


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    logger = logging.getLogger()
    handlers, level = logger.handlers[:], logger.level
    yield logger
    logger.handlers[:] = handlers
    logger.setLevel(level)


def test_json_lines(root: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(Settings(log_format="json", log_level="warning"))
    token = logs.request_id.set("abc")
    try:
        logging.getLogger("x").info("not shown")
        logging.getLogger("x").warning("two\nlines")
        try:
            raise ValueError("why")
        except ValueError:
            logging.getLogger("x").exception("failed")
    finally:
        logs.request_id.reset(token)
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert (first["level"], first["message"], first["request_id"]) == (
        "warning",
        "two\nlines",
        "abc",
    )
    assert "ValueError: why" in second["exception"]

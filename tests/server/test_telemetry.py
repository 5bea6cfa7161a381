from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from server.telemetry import configure_logging, request_id


@pytest.fixture(autouse=True)
def _root_logger_put_back() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_lines_are_json_with_the_request_id(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("info")
    token = request_id.set("abc")
    logging.getLogger("x").warning("two\nlines %s", "é", extra={"worker": "http://w", "path": object})
    request_id.reset(token)
    logging.getLogger("x").debug("unseen")
    logging.getLogger("x").info("plain", extra={"level": "forged"})
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert (first["level"], first["logger"], first["message"]) == ("warning", "x", "two\nlines é")
    assert (first["request_id"], first["worker"]) == ("abc", "http://w")
    assert "request_id" not in second
    assert second["level"] == "info"


def test_exceptions_are_part_of_their_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("error")
    try:
        raise ValueError("cause")
    except ValueError:
        logging.getLogger("x").exception("failed")
    [line] = capsys.readouterr().err.splitlines()
    assert "ValueError: cause" in json.loads(line)["exception"]


def test_an_unknown_level() -> None:
    with pytest.raises(ValueError, match="LOUD"):
        configure_logging("loud")

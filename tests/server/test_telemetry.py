from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Iterator
from io import BytesIO

import pytest
from PIL import Image

from server.serving import StartupError
from server.telemetry import configure_logging, request_id
from server.tracing import configure_tracing, span


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


def test_no_path_ends_a_line_or_moves_a_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("info")
    path = "/\u2028{}\u2029\x85\x9b31m\x1b[2J\u202e"
    logging.getLogger("x").info("request", extra={"path": path})
    said = capsys.readouterr().err
    assert said.isascii()
    assert said.rstrip("\n").isprintable()
    assert json.loads(said)["path"] == path


def test_exceptions_are_part_of_their_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("error")
    try:
        raise ValueError("cause")
    except ValueError:
        logging.getLogger("x").exception("failed")
    [line] = capsys.readouterr().err.splitlines()
    assert "ValueError: cause" in json.loads(line)["exception"]


@pytest.mark.parametrize("exif", [b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0II*\0\x08\0\0\0\x63\0"])
def test_metadata_of_a_picture_says_nothing_to_the_log(exif: bytes) -> None:
    file = BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG", exif=exif)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with Image.open(file) as picture:
            picture.load()
        assert heard
        heard.clear()
        configure_logging("info")
        with Image.open(file) as picture:
            picture.load()
        assert heard == []


def test_an_unknown_level() -> None:
    with pytest.raises(ValueError, match="LOUD"):
        configure_logging("loud")


def test_nothing_is_traced_unless_the_environment_names_a_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    configure_tracing("test")
    with span("work") as current:
        assert not current.is_recording()


def test_a_collector_without_the_extra_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(StartupError, match=r"install llama-adapter-server\[otel\]"):
        configure_tracing("test")

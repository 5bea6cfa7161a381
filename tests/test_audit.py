"""The audit of pinned packages finds what a service tells, and never calls silence an all-clear."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

AUDIT = Path(__file__).resolve().parent.parent / ".ci" / "audit.py"
FLAW = {
    "id": "PYSEC-2099-1",
    "summary": "it breaks",
    "affected": [
        {
            "package": {"name": "leftpad", "ecosystem": "PyPI"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "1.2"}]}],
        }
    ],
}


class Service(BaseHTTPRequestHandler):
    """OSV's query, for two packages."""

    known: ClassVar[dict[str, Any]] = {"leftpad": {"vulns": [FLAW]}}

    def do_POST(self) -> None:
        query = json.loads(self.rfile.read(int(self.headers["content-length"])))
        body = json.dumps(self.known.get(query["package"]["name"], {})).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def service() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/query"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def audit(folder: Path, pins: str, *more: str) -> tuple[int, str]:
    constraints = folder / "constraints.txt"
    constraints.write_text(pins)
    done = subprocess.run(
        [sys.executable, AUDIT, constraints, *more], capture_output=True, text=True, timeout=120, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_a_known_vulnerability_fails(tmp_path: Path, service: str) -> None:
    status, said = audit(tmp_path, "leftpad==1.1\nrightpad==1.0\n", "-s", "osv", "--osv-url", service)
    assert status == 1
    assert "leftpad 1.1: PYSEC-2099-1, mended in 1.2" in said


def test_none_known(tmp_path: Path, service: str) -> None:
    status, said = audit(tmp_path, "rightpad==1.0\n", "-s", "osv", "--osv-url", service, "--require")
    assert (status, said) == (0, "pip-audit: no known vulnerabilities in 1 packages\n")


def test_a_service_that_cannot_be_reached_is_said(tmp_path: Path) -> None:
    away = ("-s", "osv", "--osv-url", "http://127.0.0.1:9/v1/query", "--timeout", "2")
    status, said = audit(tmp_path, "rightpad==1.0\n", *away)
    assert status == 0
    assert said.startswith("pip-audit: NOT AUDITED.")
    assert "127.0.0.1" in said
    assert "no known" not in said
    assert audit(tmp_path, "rightpad==1.0\n", *away, "--require")[0] == 2


@pytest.mark.parametrize(("require", "status"), [(False, 0), (True, 2)])
def test_a_service_that_knows_nothing_is_said(require: bool, status: int) -> None:
    """As pip-audit reports behind a mirror without PyPI's JSON API, with exit status 0."""
    scope: dict[str, Any] = {"__name__": "audit"}
    exec(compile(AUDIT.read_text(), AUDIT, "exec"), scope)
    unknown = [{"name": "leftpad", "skip_reason": "Dependency not found on PyPI"}]
    known = [{"name": "rightpad", "version": "1.0", "vulns": []}]
    lines, code = scope["verdict"](unknown, "it knows none of the packages", require)
    assert (len(lines), code) == (1, status)
    assert "NOT AUDITED" in lines[0]
    lines, code = scope["verdict"](unknown + known, "", require)
    assert code == status
    assert lines[1].endswith("leftpad")

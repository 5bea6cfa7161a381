"""`llama-adapter serve` as its user meets it: real processes, a tiny random base, signals, failures."""

from __future__ import annotations

import base64
import json
import shlex
import signal
import socket
import stat
import subprocess
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from PIL import Image, ImageDraw, ImageFont
from service import COMMAND, Service, serving, until
from tiny_base import write_adapter, write_tiny_base

from server.settings import WorkerSettings
from server.supervisor import settings_environment

pytestmark = [pytest.mark.server, pytest.mark.timeout(180)]


def request(**changes: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "hello"}]
    return {"model": "tiny", "messages": messages, "max_tokens": 8, "ignore_eos": True} | changes


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "tiny"
    write_tiny_base(folder)
    return folder


def test_one_command_serves_base_adapters_and_experts(base: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapters" / "poet", "v1")
    write_adapter(tmp_path / "adapters" / "caption", "sight")
    (tmp_path / "adapters" / "notes").mkdir()
    write_adapter(tmp_path / "v2", "v2")
    arguments = ("--base", str(base), "--adapter-dir", str(tmp_path / "adapters"))
    with serving(*arguments, "--adapter", f"two={tmp_path / 'v2'}", "--experts", "ocr") as service:
        names = [model["id"] for model in httpx.get(f"{service.url}/v1/models").json()["data"]]
        assert names[0] == "tiny"
        assert set(names[1:]) == {"poet", "caption", "two"}
        for name in names:
            assert service.ask(request(model=name)).json()["usage"]["completion_tokens"] == 8
        check_printed_curl(service)
        check_experts(service)
        check_sockets_are_private(service)
        children = psutil.Process(service.process.pid).children()
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(60) == 0
        assert not [child for child in children if child.is_running()]
    assert "Traceback" not in service.text


def check_printed_curl(service: Service) -> None:
    """The request that the ready message shows can be pasted."""
    command = shlex.split(service.text[service.text.index("  curl") :].replace("\\\n", ""))
    assert command[0] == "curl"
    url, header, body = command[1], command[command.index("-H") + 1], command[command.index("-d") + 1]
    name, _, value = header.partition(": ")
    answer = httpx.post(url, headers={name: value}, content=body, timeout=60)
    assert answer.status_code == 200, answer.text


def check_experts(service: Service) -> None:
    picture = Image.new("RGB", (360, 80), "white")
    ImageDraw.Draw(picture).text((20, 20), "TOTAL 48.20", fill="black", font=ImageFont.load_default(32))
    encoded = BytesIO()
    picture.save(encoded, "PNG")
    url = "data:image/png;base64," + base64.b64encode(encoded.getvalue()).decode()
    content = [{"type": "text", "text": "How much?"}, {"type": "image_url", "image_url": {"url": url}}]
    answer = service.ask(request(messages=[{"role": "user", "content": content}])).json()
    outcomes = {report["name"]: report for report in answer["experts"]}
    assert outcomes["ocr"]["text"] == "TOTAL 48.20"
    assert outcomes["caption"]["outcome"] in ("ok", "empty")  # what a random adapter says is anything


def check_sockets_are_private(service: Service) -> None:
    worker = service.child("worker")
    folder = Path(worker.environ()["LLAMA_ADAPTER_UDS"]).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {path.name for path in folder.iterdir()} == {"worker.sock", "experts.sock"}


def test_signals_crashes_and_what_becomes_of_running_requests(base: Path) -> None:
    with serving("--base", str(base), "--experts", "") as service:
        stream_over_a_killed_worker(service)
        stream_over_a_shutdown(service)


def stream_over_a_killed_worker(service: Service) -> None:
    """The stream ends in an error event, and the next worker answers."""
    first = service.child("worker")
    with httpx.stream(
        "POST", f"{service.url}/v1/chat/completions", json=request(stream=True, max_tokens=400), timeout=60
    ) as response:
        lines = (line for line in response.iter_lines() if line)
        next(lines)
        first.send_signal(signal.SIGSTOP)  # so that it cannot finish before it is killed
        first.kill()
        last = list(lines)[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
    until(lambda: service.ask(request()).status_code == 200, 90)
    assert service.child("worker").pid != first.pid
    assert "the worker was killed by SIGKILL" in service.text


def stream_over_a_shutdown(service: Service) -> None:
    """A Ctrl-C lets the running request finish, refuses the next, and ends with exit code 0."""
    body = request(stream=True, max_tokens=400)
    with httpx.stream("POST", f"{service.url}/v1/chat/completions", json=body, timeout=60) as response:
        lines = (line for line in response.iter_lines() if line)
        next(lines)
        service.process.send_signal(signal.SIGINT)
        until(lambda: httpx.get(f"{service.url}/health/ready").status_code == 503)
        assert service.ask(request()).status_code == 503
        assert list(lines)[-1] == "data: [DONE]"
    assert service.process.wait(60) == 0


def test_a_killed_supervisor_leaves_no_orphans(base: Path) -> None:
    with serving("--base", str(base), "--experts", "classifier") as service:
        children = psutil.Process(service.process.pid).children(recursive=True)
        assert len(children) == 2
        service.process.kill()
        _, alive = psutil.wait_procs(children, 20)
        assert not alive


def failing(*arguments: str, code: int = 1) -> str:
    """What `serve` says when it cannot start; its exit code and that there is no traceback are checked."""
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert done.stderr.splitlines()[-1] == errors[0]
    return errors[0]


def test_a_start_that_fails_ends_with_one_sentence(base: Path, tmp_path: Path) -> None:
    truncated = tmp_path / "truncated"
    write_tiny_base(truncated)
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    given = ("--base", str(base), "--experts", "")
    assert "model.safetensors" in failing("--base", str(truncated), "--experts", "")
    assert "/nowhere" in failing("--base", "/nowhere", "--experts", "")
    assert "poet" in failing(*given, "--adapter", "poet=/nowhere/poet")
    assert "prompt_slots" in failing(*given, "--prompt-slots", "1")
    assert "'seer'" in failing("--base", str(base), "--experts", "seer")


def test_what_the_supervisor_itself_can_see_fails_at_once(base: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert "in use" in failing("--base", str(base), "--port", port)
    assert "--max-num-seqs" in failing("--base", str(base), "--max-num-seqs", "0", code=2)
    assert "--adapter-dir" in failing("--base", str(base), "--adapter-dir", "/nowhere")
    assert "known" in failing("--base", "no-such-model")


def test_settings_reach_a_child_unchanged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = WorkerSettings(
        base="a b",
        adapters=("x=é", 'y=/p,q="1"'),
        uds=tmp_path / "w",
        prefix_caching=False,
        drain_seconds=0.5,
    )
    monkeypatch.setenv("LLAMA_ADAPTER_MAX_MODEL_LEN", "7")  # ours says so, `given` was made before
    for name, value in settings_environment(given).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LLAMA_ADAPTER_MAX_MODEL_LEN")
    assert WorkerSettings() == given
    assert "LLAMA_ADAPTER_MAX_MODEL_LEN" not in settings_environment(given)

"""API keys: from settings and a file, read again when it changes, compared in full, told to nobody."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import ServerFailure
from server.gateway import keys
from server.gateway.keys import Key, KeyRing, read_keys
from server.gateway.rates import Quota, Rate
from server.options import load
from server.serving import StartupError
from server.settings import GatewaySettings
from server.telemetry import JsonFormatter
from tests.server.gateway.scripted import Launch, ScriptedWorker, story

NO_LIMITS = Quota()


def write(path: Path, text: str) -> Path:
    """As a careful operator does it: whole or not at all."""
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    fresh.replace(path)
    return path


def ring(**settings: Any) -> KeyRing:
    return KeyRing(GatewaySettings(**settings))


def test_keys_of_the_settings_have_numbers_for_names() -> None:
    known = ring(api_keys=("one", "two"), admin_keys=("root",), key_requests="5/second")
    names = [
        (caller.name, caller.admin) for key in ("one", "two", "root") if (caller := known.find(key.encode()))
    ]
    assert names == [("key-1", False), ("key-2", False), ("admin-1", True)]
    assert known.find(b"one").quota.requests == Rate(5, 1)  # type: ignore[union-attr]
    for wrong in (b"", b"on", b"onee", b"ONE", b"\xff\x00"):
        assert known.find(wrong) is None


def test_a_key_must_not_be_empty() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        GatewaySettings(api_keys=("",))


def test_every_key_is_compared_whatever_is_presented(monkeypatch: pytest.MonkeyPatch) -> None:
    known = ring(api_keys=("one", "two", "three"), admin_keys=("root",))
    compared: list[int] = []
    compare = hmac.compare_digest

    def counting(a: bytes, b: bytes) -> bool:
        compared.append(len(b))
        return compare(a, b)

    monkeypatch.setattr(keys.hmac, "compare_digest", counting)
    for token in (b"one", b"root", b"none of them", b""):
        compared.clear()
        known.find(token)
        assert compared == [32] * 4  # digests: neither length nor prefix of a key matters


def test_a_keys_file(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"hidden").hexdigest()
    path = write(
        tmp_path / "keys.toml",
        f"""
        [alice]
        key = "sk-alice"
        requests = "60/minute"
        concurrency = 4

        ["bob@example.org"]
        sha256 = "{digest}"

        [ops]
        key = "sk-ops"
        admin = true
        """,
    )
    known = ring(keys_file=path, key_tokens="1000/hour")
    assert known.required
    assert known.has_admin
    alice, bob, ops = (known.find(token) for token in (b"sk-alice", b"hidden", b"sk-ops"))
    assert alice
    assert bob
    assert ops
    assert alice.quota == Quota(Rate(60, 60), Rate(1000, 3600), 4)
    assert bob.quota == Quota(None, Rate(1000, 3600), None)
    assert (bob.name, bob.admin, ops.name, ops.admin) == ("bob@example.org", False, "ops", True)


SECRET = "sk-never-to-be-told"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f'[a]\nkey = "{SECRET}"\nsha256 = "{"0" * 64}"', "a"),
        ("[a]\nadmin = true", "either key or sha256"),
        (f'[a]\nkey = "{SECRET}"\nrequests = "many"', "a.requests"),
        (f'[a]\nkey = "{SECRET}"\nconcurrency = 0', "a.concurrency"),
        (f'[a]\nkey = "{SECRET}"\nadmin = "yes"', "a.admin"),
        (f'[a]\nkey = "{SECRET}"\nlimit = 3', "a.limit"),
        (f'[a]\nkey = "{SECRET}"\nmodels = []', "a.models"),
        (f'[a]\nkey = "{SECRET}"\nmodels = "all"', "a.models"),
        (f'[a]\nkey = ["{SECRET}"]', "a.key"),
        ('[a]\nkey = ""', "a.key"),
        (f'[a]\nkey = "{SECRET} "', "begin or end with a space"),
        (f'[a]\nkey = "\\n{SECRET}"', "begin or end with a space"),
        (f'[a]\nsha256 = "{sha256(b"").hexdigest()}"', "of an empty key"),
        (f'[a]\nsha256 = "{SECRET}"', "a.sha256"),
        (f'["a b"]\nkey = "{SECRET}"', "a b"),
        (f'a = "{SECRET}"', "a"),
        (f'[a]\nkey = "{SECRET}"\n[b]\nkey = "{SECRET}"', "a and b"),
        (f'[a\nkey = "{SECRET}"', "not TOML"),
        (f'[a]\nkey = "{SECRET}"\n[a]\nkey = "{SECRET}"', "not TOML"),
    ],
)
def test_a_bad_keys_file_stops_the_start_and_tells_no_key(tmp_path: Path, text: str, told: str) -> None:
    path = write(tmp_path / "keys.toml", text)
    with pytest.raises(StartupError) as caught:
        ring(keys_file=path)
    assert str(path) in str(caught.value)
    assert told in str(caught.value)
    assert SECRET not in str(caught.value)


def test_a_keys_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.toml", tmp_path):
        with pytest.raises(StartupError, match=str(path)):
            ring(keys_file=path)
    latin = tmp_path / "latin.toml"
    latin.write_bytes(b'[a]\nkey = "\xff"')
    with pytest.raises(StartupError, match="UTF-8"):
        ring(keys_file=latin)


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.mktemp("keys") / "keys.toml"
    path.write_bytes(raw)
    try:
        read_keys(path, NO_LIMITS)
    except StartupError as error:
        said = str(error)
    else:
        said = f"{path}: fine"
    assert said.startswith(f"{path}: ")


def test_one_key_is_one_callers(tmp_path: Path) -> None:
    """Else the first one's limits and rights would be silently those of all."""
    for settings in (
        {"api_keys": (SECRET, "other", SECRET)},
        {"api_keys": (SECRET,), "admin_keys": (SECRET,)},
        {"admin_keys": (SECRET,), "keys_file": write(tmp_path / "keys.toml", f'[alice]\nkey = "{SECRET}"')},
        {"api_keys": (SECRET,), "keys_file": tmp_path / "keys.toml"},
    ):
        with pytest.raises(StartupError, match="have the same key; give each its own") as caught:
            ring(**settings)
        assert SECRET not in str(caught.value)
    assert ring(api_keys=("other",), keys_file=tmp_path / "keys.toml").find(SECRET.encode())


@pytest.mark.parametrize("name", ["key-1", "admin-1", "anonymous"])
def test_a_name_is_one_callers(tmp_path: Path, name: str) -> None:
    """What is counted is counted by name."""
    path = write(tmp_path / "keys.toml", f'[{name}]\nkey = "its own"')
    with pytest.raises(StartupError, match=f"{name} is the name of another caller"):
        ring(api_keys=("one",), admin_keys=("root",), keys_file=path)


def test_a_change_that_takes_anothers_key_or_name_leaves_the_keys_before_it(tmp_path: Path) -> None:
    path = write(tmp_path / "keys.toml", '[a]\nkey = "first"')
    known = ring(api_keys=("given",), keys_file=path)
    for bad in ('[a]\nkey = "given"\nadmin = true', '[key-1]\nkey = "second"'):
        write(path, bad)
        known.reload()
        assert known.find(b"first")
        assert known.find(b"second") is None
        assert not known.has_admin


def test_an_empty_keys_file_closes_the_service(tmp_path: Path) -> None:
    assert ring(keys_file=write(tmp_path / "keys.toml", "")).required
    assert not ring().required


def test_a_bad_change_leaves_the_keys_before_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "keys.toml", '[a]\nkey = "first"')
    known = ring(keys_file=path)
    write(path, f'[a]\nkey = "{SECRET}"\nadmin = 7')
    known.reload()
    assert known.find(b"first")
    assert "the keys before it stay" in caplog.text
    path.unlink()
    known.reload()
    assert known.find(b"first")
    write(path, '[b]\nkey = "second"')
    known.reload()
    assert known.find(b"first") is None
    assert known.find(b"second")
    assert SECRET not in formatted(caplog)


def test_a_change_of_the_same_size_is_seen(tmp_path: Path) -> None:
    """As where a secret's folder is a link that is turned to the next version."""
    for name, key in (("v1", "11111"), ("v2", "22222")):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "keys.toml", f'[a]\nkey = "{key}"')
        os.utime(tmp_path / name / "keys.toml", (0, 0))
    (tmp_path / "now").symlink_to("v1")
    known = ring(keys_file=tmp_path / "now" / "keys.toml")
    (tmp_path / "now").unlink()
    (tmp_path / "now").symlink_to("v2")
    known.reload()
    assert known.find(b"22222")


def formatted(caplog: pytest.LogCaptureFixture) -> str:
    """All logs as the service writes them, extras included."""
    return "\n".join(JsonFormatter().format(record) for record in caplog.records)


async def test_keys_come_and_go_while_the_service_runs(
    launch: Launch, worker: ScriptedWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "_POLL_SECONDS", 0.02)
    path = write(tmp_path / "keys.toml", '[alice]\nkey = "old"')
    gateway = await launch(worker, keys_file=path)

    async def status(key: str) -> int:
        headers = {"authorization": f"Bearer {key}"}
        return (await gateway.http.get("/v1/models", headers=headers)).status_code

    assert (await status("old"), await status("new")) == (200, 401)
    write(path, '[alice]\nkey = "new"\n[root]\nkey = "top"\nadmin = true')
    for _ in range(200):
        if await status("new") == 200:
            break
    assert (await status("old"), await status("new")) == (401, 200)
    admin = {"authorization": "Bearer top"}
    assert (await gateway.http.get("/v1/adapters", headers=admin)).status_code == 200


async def test_logs_name_the_key_and_never_show_it(
    launch: Launch, worker: ScriptedWorker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "keys.toml", f'[alice]\nkey = "{SECRET}-file"\nrequests = "4/minute"')
    with caplog.at_level(logging.DEBUG):
        gateway = await launch(
            worker,
            keys_file=path,
            api_keys=(f"{SECRET}-api",),
            admin_keys=(f"{SECRET}-admin",),
            limits_store="memory://",
        )
        for key in ("file", "api", "admin", "wrong"):
            gateway.http.headers["authorization"] = f"Bearer {SECRET}-{key}"
            await gateway.chat()
            await gateway.chat(stream=True)
            await gateway.chat(temperature="hot")
            await gateway.http.post("/v1/adapters", json={"id": "x", "path": "y"})
            await gateway.chat()  # over alice's limit
            await gateway.http.get("/nothing")
        settings = gateway.app.state.gateway.settings
        logging.getLogger("test").info("settings: %r %s", settings, settings, extra={"settings": settings})
    own = [record for record in caplog.records if record.name.startswith(("server", "test"))]
    lines = "\n".join(JsonFormatter().format(record) for record in own)
    assert '"key": "alice"' in lines
    assert '"status": 429' in lines
    assert SECRET not in lines


def test_start_up_errors_tell_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_ADAPTER_API_KEYS", SECRET)  # a list in the environment is JSON
    with pytest.raises(StartupError) as caught:
        load(GatewaySettings, {})
    assert "api_keys" in str(caught.value)
    assert SECRET not in str(caught.value)
    monkeypatch.setenv("LLAMA_ADAPTER_API_KEYS", f'["{SECRET}", 7, ["{SECRET}"], ""]')
    with pytest.raises(StartupError) as caught:
        load(GatewaySettings, {})
    assert "--api-key" in str(caught.value)
    assert SECRET not in str(caught.value)
    monkeypatch.delenv("LLAMA_ADAPTER_API_KEYS")
    with pytest.raises(StartupError, match=r"--key-requests .* not 'many'"):
        load(GatewaySettings, {"key_requests": "many"})
    assert load(GatewaySettings, {"api_keys": [SECRET]}).api_keys[0].get_secret_value() == SECRET


def test_who_sends_no_key_has_none() -> None:
    known = ring(api_keys=("sk-a",))
    known._given.append(Key(sha256(b"").digest(), known.anyone))
    assert known.find(b"") is None
    assert known.find(b"sk-a") is not None


@pytest.mark.parametrize("key", [" sk-a", "sk-a\n", " "])
def test_a_key_of_the_settings_that_no_header_can_carry(key: str) -> None:
    with pytest.raises(StartupError, match="key-2 is empty, or begins or ends with a space"):
        ring(api_keys=("sk-b", key))


async def test_a_key_may_be_for_some_models_alone(
    launch: Launch, worker: ScriptedWorker, tmp_path: Path
) -> None:
    path = write(
        tmp_path / "keys.toml",
        """
        [alice]
        key = "hers"
        models = ["alpaca", "org/*"]
        [root]
        key = "all"
        admin = true
        [prometheus]
        key = "scrapes"
        metrics = true
        models = ["-"]
        """,
    )
    gateway = await launch(worker, keys_file=path)

    async def answers(key: str, model: str) -> list[httpx.Response]:
        gateway.http.headers["authorization"] = f"Bearer {key}"
        talk = {"model": model, "messages": [{"role": "user", "content": "Hi"}]}
        return [
            await gateway.http.post("/v1/chat/completions", json=talk),
            await gateway.http.post("/v1/chat/completions", json=talk | {"stream": True}),
            await gateway.http.post("/v1/responses", json={"model": model, "input": "Hi"}),
            await gateway.http.post("/v1/completions", json={"model": model, "prompt": "Hi"}),
            await gateway.http.post("/v1/completions", json={"model": model, "prompt": "Hi", "stream": True}),
            await gateway.http.post("/tokenize", json={"model": model, "prompt": "Hi"}),
            await gateway.http.post("/detokenize", json={"model": model, "tokens": [72]}),
            await gateway.http.get(f"/v1/models/{model}"),
        ]

    for key, model in (("hers", "alpaca"), ("hers", "org/sees"), ("all", "base"), ("all", "org/sees")):
        assert [answer.status_code for answer in await answers(key, model)] == [200] * 8
    hidden = await answers("hers", "base")
    absent = await answers("hers", "none")
    assert [answer.status_code for answer in hidden] == [404] * 8
    assert [a.text.replace("base", "none") for a in hidden] == [a.text for a in absent]  # which tells nothing
    gates = await gateway.http.get("/v1/adapters/base/gates")
    assert gates.json() == hidden[0].json()
    listed = (await gateway.http.get("/v1/models")).json()["data"]
    assert [model["id"] for model in listed] == ["alpaca", "org/sees"]
    assert (await gateway.http.get("/metrics")).status_code == 403
    assert [answer.status_code for answer in await answers("scrapes", "base")] == [404] * 8
    assert 'key="alice"' in (await gateway.http.get("/metrics")).text


async def test_what_each_key_took_is_in_metrics_and_log(
    launch: Launch, worker: ScriptedWorker, caplog: pytest.LogCaptureFixture
) -> None:
    gateway = await launch(worker, api_keys=("one", "two"), admin_keys=("root",))
    worker.events = story("a", "b", "c", prompt_tokens=7)
    with caplog.at_level(logging.INFO):
        for key in ("one", "one", "two"):
            gateway.http.headers["authorization"] = f"Bearer {key}"
            await gateway.chat(model="alpaca", n=2)
        worker.refusal = ServerFailure("Broken.")
        await gateway.chat(model="alpaca")
    assert "key-1" not in (await gateway.http.get("/metrics")).text  # nobody's business
    gateway.http.headers["authorization"] = "Bearer root"
    metrics = (await gateway.http.get("/metrics")).text
    taken = 'llama_adapter:key_tokens_total{key="%s",kind="%s",model="alpaca"} %s'
    assert taken % ("key-1", "prompt", 14.0) in metrics  # a prompt counts once for both choices
    assert taken % ("key-1", "completion", 12.0) in metrics
    assert taken % ("key-2", "completion", 6.0) in metrics
    told = [record.__dict__ for record in caplog.records if record.message == "generation ended"]
    assert [(r["key"], r["model"], r["prompt_tokens"], r["completion_tokens"]) for r in told] == [
        ("key-1", "alpaca", 7, 6), ("key-1", "alpaca", 7, 6), ("key-2", "alpaca", 7, 6)
    ]  # fmt: skip

"""What is loaded at run time outlives a worker, and holds for all that share the file: on real engines."""

from __future__ import annotations

import asyncio
import errno
import logging
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from tiny_base import write_adapter, write_tiny_base

from server.errors import InvalidRequest, NotFound
from server.serving import StartupError
from server.settings import WorkerSettings
from server.worker.adapter_state import AdapterState, Change, RunTimeAdapters
from server.worker.build import build_engine
from server.worker.engine import NativeEngine
from server.worker.messages import GenerateRequest, LoadAdapterRequest, SamplingParams, TextPrompt

pytestmark = pytest.mark.timeout(120)


class Worker:
    """An engine and what loads its adapters, as the worker's app has them."""

    def __init__(self, engine: NativeEngine, adapters: RunTimeAdapters) -> None:
        self.engine = engine
        self.load = adapters.load
        self.unload = adapters.unload

    @property
    def versions(self) -> dict[str, int]:
        return {info.id: info.version for info in self.engine.models()[1:]}


Start = Callable[[], Awaitable[Worker]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "tiny"
    write_tiny_base(folder)
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for i, id in enumerate(("poet", "clerk")):
        write_adapter(tmp_path / "adapters" / id, "v1", seed=i)
    return tmp_path / "adapters"


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state.json"


@pytest.fixture
async def start(base: Path, root: Path, state: Path) -> AsyncIterator[Start]:
    """`await start()` is one more worker that shares the state; its settings name no adapter."""
    async with AsyncExitStack() as stack:

        async def start() -> Worker:
            settings = WorkerSettings(
                base=str(base), dtype="float32", kv_cache_mib=1, adapter_root=root, adapter_state=state
            )
            engine = build_engine(settings)
            adapters = RunTimeAdapters(engine, AdapterState(state))
            await engine.start()
            stack.push_async_callback(engine.stop)
            await adapters.start()
            stack.push_async_callback(adapters.stop)
            return Worker(engine, adapters)

        yield start


def asked(id: str, path: str | None = None, **options: str) -> LoadAdapterRequest:
    return LoadAdapterRequest(id, path or id, options)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - what is waited for is a look at a file
            await asyncio.sleep(0.02)


async def test_a_worker_starts_with_what_the_one_before_it_had(start: Start) -> None:
    first = await start()
    await first.load(asked("poet"))
    await first.load(asked("clerk", template="plain"))
    await first.load(asked("poet"))
    await first.load(asked("gone", "clerk"))
    await first.unload("gone")
    assert first.versions == {"poet": 2, "clerk": 1}
    second = await start()
    assert second.versions == first.versions
    templates = {
        id: model.adapter.adapter.config.template
        for id, model in second.engine._models.items()
        if id != "tiny"
    }
    assert templates == {"poet": "alpaca", "clerk": "plain"}
    await second.load(asked("gone", "poet"))
    assert second.versions["gone"] == 2  # never again that of what was unloaded


async def test_workers_that_share_the_file_follow_each_other(start: Start) -> None:
    first, second = await start(), await start()
    await first.load(asked("poet"))
    await until(lambda: second.versions == {"poet": 1})
    await second.load(asked("poet", "clerk"))
    await until(lambda: first.versions == {"poet": 2})
    await first.unload("poet")
    await until(lambda: second.versions == {})
    assert first.versions == {}


async def test_both_asked_at_once_load_once_each(start: Start) -> None:
    """As a gateway does; neither then takes the other's word for news."""
    first, second = await start(), await start()
    await asyncio.gather(first.load(asked("poet")), second.load(asked("poet")))
    await asyncio.sleep(2.5)  # each has looked
    assert first.versions == second.versions == {"poet": 1}


async def test_an_unloading_is_remembered_before_requests_have_ended(start: Start) -> None:
    worker = await start()
    await worker.load(asked("poet"))
    sampling = SamplingParams(temperature=0, max_tokens=300, ignore_eos=True)
    events = worker.engine.generate(GenerateRequest("r", "poet", TextPrompt("hello"), sampling))
    await anext(events)
    unloading = asyncio.create_task(worker.unload("poet"))
    await until(lambda: worker.versions == {})
    assert (await start()).versions == {}
    assert not unloading.done()
    await events.aclose()
    await unloading


async def test_what_cannot_be_loaded_again_is_named_and_left_out(
    start: Start, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = await start()
    for id in ("poet", "clerk"):
        await first.load(asked(id))
    shutil.rmtree(root / "poet")
    with caplog.at_level(logging.ERROR):
        second = await start()
    assert second.versions == {"clerk": 1}
    [record] = caplog.records
    assert "'poet' cannot be loaded again" in record.getMessage()
    assert "is not in the adapter root" in record.getMessage()


async def test_refused_changes_are_not_remembered(start: Start, root: Path, state: Path) -> None:
    worker = await start()
    with pytest.raises(InvalidRequest):
        await worker.load(asked("poet", "../tiny"))
    for id in ("nobody", "tiny"):
        with pytest.raises(NotFound):
            await worker.unload(id)
    assert AdapterState(state).read() == {}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"poet": {"path": "poet"}}', b"\xff"])
async def test_a_damaged_file_stops_the_start(start: Start, state: Path, content: bytes) -> None:
    await asyncio.to_thread(state.write_bytes, content)
    with pytest.raises(StartupError, match=r"state\.json cannot be read .*; mend it, or delete it"):
        await start()


async def test_a_file_that_is_damaged_later_is_told_and_changes_nothing(
    start: Start, state: Path, caplog: pytest.LogCaptureFixture
) -> None:
    worker = await start()
    await worker.load(asked("poet"))
    await asyncio.to_thread(state.write_text, "{")
    with caplog.at_level(logging.ERROR):
        await until(lambda: "state.json cannot be read" in caplog.text)
        await worker.load(asked("clerk"))
    assert worker.versions == {"poet": 1, "clerk": 1}
    assert "'clerk' will not be remembered" in caplog.text


def test_nothing_is_lost_between_workers_that_write_at_once(state: Path) -> None:
    """Each has its own object, as each process would."""
    changes = {f"adapter-{i}": Change(i, f"path-{i}", {"gate": "raw"}) for i in range(40)}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda item: AdapterState(state).record(*item), changes.items()))
    assert AdapterState(state).read() == changes
    assert {path.name for path in state.parent.iterdir()} <= {"state.json", "state.json.lock"}


@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.replace"])
def test_a_full_disk_is_not_filled_further(state: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    AdapterState(state).record("poet", Change(1, "poet"))
    before = set(state.parent.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(step, full)
        with pytest.raises(OSError, match="No space left"):
            AdapterState(state).record("other", Change(1, "other"))
    assert set(state.parent.iterdir()) == before
    assert set(AdapterState(state).read()) == {"poet"}


def test_without_a_file_nothing_is_kept() -> None:
    state = AdapterState(None)
    state.record("poet", Change(1, "poet"))
    assert state.read() == state.read_if_new() == {}

"""The engine as the worker's routes use it: real files, a tiny base, the real step thread."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from io import BytesIO
from pathlib import Path

import pytest
import torch
from adapter_files import K, reference_7b, reference_v1
from PIL import Image
from support import random_adapter
from tiny_base import adapter_config, tiny_config, write_adapter, write_tiny_base

from models.adapter_config import LinearName, LoraConfig, PromptConfig
from models.checkpoints.native import save_adapter
from models.errors import AdapterMismatch, CheckpointError, ModelError
from models.kv_cache import KVCache
from server.errors import ApiError, InvalidRequest, NotFound, RateLimited, Timeout, Unavailable
from server.serving import StartupError
from server.settings import MIB, WorkerSettings
from server.worker.adapter_loading import AdapterLoader
from server.worker.build import _try_longest, build, build_engine
from server.worker.engine import NativeEngine
from server.worker.messages import (
    ChatMessage,
    ChatPrompt,
    ContextItem,
    Delta,
    DetokenizeRequest,
    Finished,
    GenerateRequest,
    SamplingParams,
    Started,
    TextPrompt,
    TokenizeRequest,
    TokenPrompt,
)
from server.worker.runner import Runner
from server.worker.sight import LoadedAdapter


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_tiny_base(folder / "tiny")
    for i, kind in enumerate(("v1", "v2", "sight")):
        write_adapter(folder / "adapters" / kind, kind, seed=i)
    return folder


def settings(folder: Path, **changes) -> WorkerSettings:
    values = {
        "base": str(folder / "tiny"),
        "dtype": "float32",
        "kv_cache_mib": 1,
        "adapters": tuple(f"{kind}={folder / 'adapters' / kind}" for kind in ("v1", "v2", "sight")),
        "adapter_root": folder / "adapters",
    }
    return WorkerSettings(**(values | changes))


@pytest.fixture
async def engine(folder: Path) -> AsyncGenerator[NativeEngine, None]:
    engine = build_engine(settings(folder))
    await engine.start()
    yield engine
    await engine.stop()


def chat(
    text: str, model: str = "tiny", id: str = "r", max_tokens: int | None = 8, **fields
) -> GenerateRequest:
    sampling = fields.pop("sampling", SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True))
    context = fields.pop("context", ())
    return GenerateRequest(id, model, ChatPrompt((ChatMessage("user", text),), context), sampling, **fields)


async def collect(engine: NativeEngine, request: GenerateRequest) -> list:
    return [event async for event in engine.generate(request)]


def text_of(events: list) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta))


def picture(color: str) -> bytes:
    data = BytesIO()
    Image.new("RGB", (40, 30), color).save(data, "PNG")
    return data.getvalue()


async def settle(engine: NativeEngine) -> None:
    """Wait until the step thread has nothing to do."""
    for _ in range(500):
        stats = engine.stats()
        if not (stats.running or stats.waiting or stats.kv_blocks_used):
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"the engine never came to rest: {engine.stats()}")


async def until_running(engine: NativeEngine) -> None:
    for _ in range(1000):
        if engine.stats().running:
            return
        await asyncio.sleep(0.002)
    raise AssertionError("nothing ever ran")


async def test_models_are_the_base_and_its_adapters(engine: NativeEngine):
    models = {model.id: model for model in engine.models()}
    assert list(models) == ["tiny", "v1", "v2", "sight"]
    assert models["tiny"].kind == "base"
    assert models["sight"].parent == "tiny"
    assert [model.reads_images for model in models.values()] == [False, False, False, True]
    assert models["v2"].variant == "V2 text"


async def test_a_mixed_batch_answers_as_each_alone(engine: NativeEngine):
    images = {"red": picture("red"), "blue": picture("blue")}
    requests = [
        chat("hello there", model, id=f"{model}-{i}-{color}", images=(images[color],), max_tokens=12)
        for i in range(2)
        for model in ("tiny", "v1", "v2", "sight")
        for color in images
    ]
    together = await asyncio.gather(*(collect(engine, request) for request in requests))
    alone = [await collect(engine, request) for request in requests]
    assert [text_of(events) for events in together] == [text_of(events) for events in alone]
    answers = {
        request.request_id: text_of(events) for request, events in zip(requests, together, strict=True)
    }
    assert len({answers[f"{model}-0-red"] for model in ("tiny", "v1", "v2", "sight")}) == 4
    assert answers["sight-0-red"] != answers["sight-0-blue"]  # it looks
    assert answers["v1-0-red"] == answers["v1-0-blue"]


async def test_the_events_of_a_request(engine: NativeEngine):
    question = "hello, how are you today, and what do you think of the weather"
    events = await collect(engine, chat(question, max_tokens=5))
    assert isinstance(events[0], Started)
    assert isinstance(events[-1], Finished)
    assert events[-1].finish_reason == "length"
    assert events[-1].usage.completion_tokens == 5
    assert events[-1].usage.prompt_tokens == events[0].prompt_tokens
    again = await collect(engine, chat(question, max_tokens=5))
    assert again[-1].usage.cached_tokens > 0
    assert text_of(again) == text_of(events)


async def test_context_enters_the_prompt(engine: NativeEngine):
    prompt = ChatPrompt((ChatMessage("user", "What is the total?"),), (ContextItem("ocr", "Total 9.95"),))
    tokens = await engine.tokenize(TokenizeRequest("tiny", prompt))
    text = (await engine.detokenize(DetokenizeRequest("tiny", tokens.token_ids))).text
    assert "OCR Context: Total 9.95\nWhat is the total?" in text
    tokens = await engine.tokenize(TokenizeRequest("v1", prompt))
    text = (await engine.detokenize(DetokenizeRequest("v1", tokens.token_ids))).text
    assert text.endswith("### Input:\nOCR Context: Total 9.95\n\n### Response:")


async def test_seeded_sampling_repeats_itself_whatever_is_beside_it(engine: NativeEngine):
    def seeded(id: str, seed: int) -> GenerateRequest:
        params = SamplingParams(temperature=1.2, top_p=0.9, seed=seed, max_tokens=16, ignore_eos=True)
        return chat("tell", id=id, sampling=params)

    first, other = await collect(engine, seeded("a", 7)), await collect(engine, seeded("b", 8))
    crowd = await asyncio.gather(*(collect(engine, seeded(f"c{i}", 7 + i % 2)) for i in range(6)))
    assert text_of(first) != text_of(other)
    assert [text_of(events) for events in crowd] == [text_of(first), text_of(other)] * 3


@pytest.mark.parametrize(
    ("request_", "error", "word"),
    [
        (chat("x", model="nobody"), NotFound, "nobody"),
        (chat("x " * 600), InvalidRequest, "context"),
        (chat("x", max_tokens=5000), InvalidRequest, "max_tokens"),
        (chat("x", sampling=SamplingParams(min_tokens=5000)), InvalidRequest, "min_tokens 5000"),
        (GenerateRequest("r", "tiny", TokenPrompt((1, 99999))), InvalidRequest, "99999"),
        (GenerateRequest("r", "tiny", TokenPrompt(())), InvalidRequest, "at least one token"),
        (chat("x", model="sight", images=(b"no image",)), InvalidRequest, "image"),
        (chat("x", sampling=SamplingParams(logit_bias={-1: 1.0})), InvalidRequest, "-1"),
    ],
)
async def test_what_cannot_be_answered_is_refused_before_the_first_event(
    engine: NativeEngine, request_: GenerateRequest, error: type[ApiError], word: str
):
    with pytest.raises(error, match=word):
        await collect(engine, request_)
    await settle(engine)
    assert text_of(await collect(engine, chat("still here?")))


def test_a_start_tells_of_compiling_before_it_is_silent(folder: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO", "server.worker.build"):
        build_engine(settings(folder, adapters=()))
    said = [record.getMessage().split()[0] for record in caplog.records]
    assert said == ["warming", "loaded"]


def test_prompts_beside_decodes_keep_a_pace_unless_told_otherwise(folder: Path):
    """Without one a chunk is as long as the budget, and streams halt for all of it."""
    engine = build_engine(settings(folder, adapters=()))
    assert engine._step_loop._scheduler.pace is not None


async def test_an_empty_prompt_is_not_called_too_long(engine: NativeEngine):
    """Clients shorten what they send where they read that code."""
    for prompt in (TokenPrompt(()), TextPrompt("", add_special_tokens=False)):
        with pytest.raises(InvalidRequest, match=r"prompt: .* at least one token") as refused:
            await collect(engine, GenerateRequest("r", "tiny", prompt, SamplingParams(max_tokens=4)))
        assert (refused.value.param, refused.value.code) == ("prompt", None)


async def test_a_text_that_cannot_fit_is_not_rendered_first(folder: Path, tmp_path: Path):
    shutil.copytree(folder / "tiny", tmp_path / "tiny")
    (tmp_path / "tiny" / "chat_template.jinja").write_text("{{ raise_exception('it was rendered') }}")
    engine = build_engine(settings(folder, base=str(tmp_path / "tiny"), adapters=()))
    await engine.start()
    with pytest.raises(InvalidRequest, match="it was rendered"):
        await collect(engine, chat("x"))
    with pytest.raises(InvalidRequest, match="a text of 10000000 characters cannot fit"):
        await collect(engine, chat("x" * 10_000_000))
    await engine.stop()


async def test_logit_bias_and_stop_strings_are_honoured(engine: NativeEngine):
    # No token but this one is possible, so its text comes again and again.
    (token,) = (await engine.tokenize(TokenizeRequest("tiny", TextPrompt("q", False)))).token_ids
    params = SamplingParams(temperature=0, max_tokens=6, logit_bias={token: 100.0})
    events = await collect(engine, chat("x", sampling=params))
    assert text_of(events) == "qqqqqq"
    params = SamplingParams(temperature=0, max_tokens=6, logit_bias={token: 100.0}, stop=("qqq",))
    events = await collect(engine, chat("x", sampling=params))
    assert text_of(events) == ""
    assert events[-1].finish_reason == "stop"
    params = SamplingParams(
        temperature=0, max_tokens=6, logit_bias={token: 4.0}, frequency_penalty=2.0, presence_penalty=2.0
    )
    assert text_of(await collect(engine, chat("x", sampling=params))) != "qqqqqq"


async def test_a_closed_stream_frees_its_blocks(engine: NativeEngine):
    stream = engine.generate(chat("go on", max_tokens=400))
    async for event in stream:
        if isinstance(event, Delta):
            break
    assert engine.stats().kv_blocks_used > 0
    await stream.aclose()
    await settle(engine)
    assert engine.stats().kv_blocks_used == 0


async def test_the_deadline_ends_a_request(engine: NativeEngine):
    with pytest.raises(Timeout):
        await collect(engine, chat("go on", max_tokens=450, timeout_seconds=0.05))
    await settle(engine)


@pytest.mark.parametrize("busy", ["preparing", "steps"])
async def test_the_deadline_ends_a_request_that_waits_for_a_thread(engine: NativeEngine, busy: str):
    go_on = threading.Event()
    if busy == "preparing":
        for _ in range(2):
            engine._preparing.submit(go_on.wait, 10)
    else:
        engine._inbox.put(lambda: go_on.wait(10))
    began = time.monotonic()
    with pytest.raises(Timeout):
        await collect(engine, chat("x", timeout_seconds=0.1))
    assert time.monotonic() - began < 5
    go_on.set()
    assert text_of(await collect(engine, chat("x")))  # its id is free
    await settle(engine)
    engine._step_loop.check_integrity()


async def test_a_full_engine_says_so(folder: Path):
    engine = build_engine(settings(folder, max_num_seqs=1, max_waiting=1, prompt_slots=1))
    await engine.start()
    results = await asyncio.gather(
        *(collect(engine, chat("x", id=str(i), max_tokens=100)) for i in range(5)), return_exceptions=True
    )
    refused = [result for result in results if isinstance(result, RateLimited)]
    assert len(refused) == 3
    assert refused[0].retry_after
    await engine.stop()


async def test_stopping_ends_what_runs_with_an_error(folder: Path):
    engine = build_engine(settings(folder))
    await engine.start()
    task = asyncio.create_task(collect(engine, chat("x", max_tokens=450)))
    await until_running(engine)
    await engine.stop()
    events = await task
    assert events[-1].type == "failed"
    assert events[-1].status == 503
    assert not engine.healthy


def held_steps(
    engine: NativeEngine, monkeypatch: pytest.MonkeyPatch
) -> tuple[threading.Event, threading.Event]:
    """Set when a step has begun, and to be set to let it go on."""
    busy, go_on = threading.Event(), threading.Event()
    run = engine._step_loop.runner.run

    def held(*arguments):
        busy.set()
        assert go_on.wait(10)
        return run(*arguments)

    monkeypatch.setattr(engine._step_loop.runner, "run", held)
    return busy, go_on


async def test_a_request_that_the_step_thread_never_takes_ends_with_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """It lay behind the word to stop, or the thread died first: nobody would ever have answered."""
    engine = build_engine(settings(folder))
    busy, go_on = held_steps(engine, monkeypatch)
    await engine.start()
    first = asyncio.create_task(collect(engine, chat("first", id="first")))
    assert await asyncio.to_thread(busy.wait, 10)
    stopping = asyncio.create_task(engine.stop())
    await asyncio.sleep(0)
    late = asyncio.create_task(collect(engine, chat("second", id="second")))
    for _ in range(500):
        if engine._inbox.qsize() == 2:
            break
        await asyncio.sleep(0.01)
    go_on.set()
    await asyncio.gather(stopping, first)
    with pytest.raises(Unavailable):
        await asyncio.wait_for(late, 5)


async def test_a_lost_device_makes_the_engine_unhealthy(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """A step that failed for another reason does not."""
    engine = build_engine(settings(folder))
    monkeypatch.setattr(engine._step_loop.runner, "run", lambda *step: 1 / 0)
    await engine.start()
    assert (await collect(engine, chat("x")))[-1].status == 500
    assert engine.healthy

    def lose(device: torch.device) -> None:
        raise RuntimeError("the context is gone")

    monkeypatch.setattr("server.worker.step_loop.check_device", lose)
    assert (await collect(engine, chat("x")))[-1].status == 503
    assert not engine.healthy
    with pytest.raises(Unavailable):
        await collect(engine, chat("x"))
    await engine.stop()


async def test_adapters_come_and_go_while_others_run(engine: NativeEngine, folder: Path, tmp_path: Path):
    before = text_of(await collect(engine, chat("hello", "v1")))
    running = asyncio.create_task(collect(engine, chat("hello", "v1", id="long", max_tokens=300)))
    await until_running(engine)

    write_adapter(folder / "adapters" / "late", "v1", seed=9)
    info = await engine.load_adapter("late", "late")
    assert (info.id, info.version, info.parent) == ("late", 1, "tiny")
    late = text_of(await collect(engine, chat("hello", "late")))
    assert late != before

    unused = await engine.unload_adapter("v1")
    with pytest.raises(NotFound):
        await collect(engine, chat("hello", "v1"))
    assert not unused.done()  # it waits for the long request
    events = await running
    await unused
    assert events[-1].usage.completion_tokens == 300
    assert text_of(events).startswith(before)

    info = await engine.load_adapter("v1", "v1")
    assert info.version == 2


async def test_an_adapter_that_was_loaded_is_in_its_slots(engine: NativeEngine, folder: Path):
    """Beside a request that runs, too; who leaves before the end leaves nothing."""
    running = asyncio.create_task(collect(engine, chat("hello", id="long", max_tokens=300)))
    await until_running(engine)
    runner = engine._step_loop.runner
    info = await engine.load_adapter("late", "v1")
    assert (("late", info.version), None) in runner.prompt_slots
    assert ("late", info.version) in runner.adapter_slots

    filling = Runner.filling

    def slow(self: Runner, loaded: LoadedAdapter, use_room: Callable[[], None]) -> Iterator[None]:
        yield from filling(self, loaded, use_room)
        yield from itertools.repeat(None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, "filling", slow)
        never = asyncio.create_task(engine.load_adapter("gone", "v1"))
        for _ in range(5000):
            if ("gone", 1) in runner.adapter_slots:
                break
            await asyncio.sleep(0.001)
        assert ("gone", 1) in runner.adapter_slots
        never.cancel()
        with pytest.raises(asyncio.CancelledError):
            await never
    await engine._ask(lambda: None)
    assert ("gone", 1) not in runner.adapter_slots
    assert "gone" not in [model.id for model in engine.models()]
    assert (await running)[-1].usage.completion_tokens == 300


async def test_whoever_computes_means_the_bases_device(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """A thread's GPU is the first, until it is told otherwise."""
    told: list[tuple[str, torch.device]] = []

    def use(device: torch.device) -> None:
        told.append((threading.current_thread().name, device))

    for module in ("build", "engine"):
        monkeypatch.setattr(f"server.worker.{module}.use_device", use)
    engine = build_engine(settings(folder, adapters=()))
    await engine.start()
    await engine.stop()
    names = [threading.current_thread().name, "engine-steps"]
    assert told == [(name, torch.device("cpu")) for name in names]


async def test_an_adapter_that_finds_no_memory_is_no_fault_of_ours(
    engine: NativeEngine, monkeypatch: pytest.MonkeyPatch
):
    def room_for(self: Runner, loaded: LoadedAdapter, pause: Callable[[], None]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")

    monkeypatch.setattr(Runner, "room_for", room_for)
    with pytest.raises(Unavailable, match=r"no room for adapter 'late'; unload another one"):
        await engine.load_adapter("late", "v1")
    assert "late" not in {model.id for model in engine.models()}


def test_a_device_that_is_too_small_stops_the_start_with_a_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    def no_cache(*_: object) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 16.00 GiB of "
            "which 3.00 GiB is free. Including non-PyTorch memory, this process has 13.00 GiB memory in use."
        )

    monkeypatch.setattr(KVCache, "__init__", no_cache)
    with pytest.raises(StartupError, match=r"a KV cache of 1 MiB; lower kv_cache_mib.*GiB is free\.$"):
        build(settings(folder, adapters=()))


def test_the_longest_step_is_tried_and_forgotten(folder: Path, monkeypatch: pytest.MonkeyPatch):
    engine = build_engine(settings(folder, adapters=(), max_num_batched_tokens=80))
    loop, run, steps = engine._step_loop, Runner.run, []

    def counted(self: Runner, items: list, *rest: object) -> torch.Tensor:
        logits_MV = run(self, items, *rest)
        steps.append((sum(len(item.tokens) for item in items), len(logits_MV)))
        return logits_MV

    monkeypatch.setattr(Runner, "run", counted)
    _try_longest(loop, loop._scheduler)
    assert steps == [(80, 80), (1, 1), (1, 1)]  # tokens, and rows of logits: all may be asked for
    assert loop._scheduler.blocks.stats.cached == loop._scheduler.blocks.stats.prefix_queries == 0


async def test_reading_pauses_while_requests_run(engine: NativeEngine, monkeypatch: pytest.MonkeyPatch):
    pauses = []
    monkeypatch.setattr("server.worker.engine_base.time.sleep", pauses.append)
    await engine.load_adapter("idle", "v1")
    assert not pauses
    busy, go_on = held_steps(engine, monkeypatch)
    running = asyncio.create_task(collect(engine, chat("hello", id="long")))
    await asyncio.to_thread(busy.wait)
    loading = asyncio.create_task(engine.load_adapter("busy", "v1"))
    for _ in range(500):
        if len(pauses) >= 3:
            break
        await asyncio.sleep(0.01)
    go_on.set()
    await asyncio.gather(running, loading)
    assert len(pauses) >= 3


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
async def test_adapters_are_read_behind_what_computes(
    engine: NativeEngine, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    priorities = []
    read = AdapterLoader.load_at_run_time

    def load(*args):
        priorities.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return read(*args)

    monkeypatch.setattr(AdapterLoader, "load_at_run_time", load)
    await engine.load_adapter("late", "v1")
    ours = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert priorities == [max(10, ours)]


async def test_options_say_at_run_time_what_a_file_cannot(engine: NativeEngine, folder: Path):
    """One file of the reference code, read with and without tanh: two adapters."""
    torch.save(reference_v1(tiny_config()).tensors, folder / "adapters" / "v1.pth")
    told = {"length": str(K), "template": "plain"}
    await engine.load_adapter("tanh", "v1.pth", told)
    await engine.load_adapter("raw", "v1.pth", {**told, "gate": "raw"})
    tanh, raw = [text_of(await collect(engine, chat("hello", id))) for id in ("tanh", "raw")]
    assert tanh != raw


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"gate": "sigmoid"}, "gate=sigmoid; use tanh or raw"),
        ({"colour": "bgr"}, "'colour' is no option; there are gate, template"),
        ({"encoder": "open_clip:ViT-B-32:../x,y"}, "encoder='open_clip:ViT-B-32:../x,y'; use efficientnet"),
    ],
)
async def test_wrong_options_at_run_time_are_named(engine: NativeEngine, options: dict[str, str], match: str):
    with pytest.raises(InvalidRequest) as caught:
        await engine.load_adapter("new", "v1", options)
    assert caught.value.param == "options"
    assert match in caught.value.message


async def test_run_time_loading_opens_no_encoder_file(engine: NativeEngine, folder: Path):
    """Its path would lie outside the adapter root, whether an option or an adapter.json names it."""
    name = f"open_clip:ViT-S-32:{folder / 'weights.pt'}"
    torch.save({"model": reference_7b(tiny_config()).tensors}, folder / "adapters" / "7b.pth")
    with pytest.raises(InvalidRequest, match="run-time loading does not open"):
        await engine.load_adapter("new", "7b.pth", {"encoder": name})
    write_adapter(folder / "adapters" / "named", "sight")
    manifest = folder / "adapters" / "named" / "adapter.json"
    manifest.write_text(manifest.read_text().replace("efficientnet-lite0", name))
    with pytest.raises(InvalidRequest, match="run-time loading does not open"):
        await engine.load_adapter("new", "named")


async def test_a_new_version_never_meets_the_old_ones_blocks(engine: NativeEngine, folder: Path):
    write_adapter(folder / "adapters" / "changing", "v1", seed=20)
    await engine.load_adapter("changing", "changing")
    question = "the very same question, long enough to fill several blocks of the cache"
    old = await collect(engine, chat(question, "changing"))
    assert (await collect(engine, chat(question, "changing")))[-1].usage.cached_tokens > 0
    write_adapter(folder / "adapters" / "changing", "v1", seed=21)
    info = await engine.load_adapter("changing", "changing")
    assert info.version == 2
    new = await collect(engine, chat(question, "changing"))
    assert new[-1].usage.cached_tokens == 0
    assert text_of(new) != text_of(old)


@pytest.mark.parametrize("path", ["../tiny", "/etc", "nothing-there", "tiny/../../x"])
async def test_paths_outside_the_root_are_refused(engine: NativeEngine, path: str):
    with pytest.raises(InvalidRequest) as caught:
        await engine.load_adapter("new", path)
    assert caught.value.param == "path"
    assert [model.id for model in engine.models()] == ["tiny", "v1", "v2", "sight"]


async def test_a_broken_adapter_is_refused_and_the_engine_goes_on(engine: NativeEngine, folder: Path):
    broken = folder / "adapters" / "broken"
    write_adapter(broken, "v1")
    weights = broken / "adapter.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InvalidRequest, match=r"adapter\.safetensors"):
        await engine.load_adapter("broken", "broken")
    with pytest.raises(NotFound):
        await engine.unload_adapter("broken")
    assert text_of(await collect(engine, chat("still here?")))


def write_long(folder: Path, rows: int) -> None:
    config = adapter_config("v1")
    config = config.model_copy(update={"prompt": PromptConfig(length=rows, layers=(3,))})
    save_adapter(random_adapter(config), folder)


async def test_prompts_too_long_for_the_cache_are_refused(folder: Path):
    """A file of kilobytes, whose rows would be made for every slot and layer."""
    engine = build_engine(
        settings(folder, prompt_cache_mib=1, adapters=(f"v1={folder / 'adapters' / 'v1'}",))
    )
    await engine.start()
    cache = engine._step_loop.runner.prompt_cache
    row = cache.bytes_of(1)
    assert row == 129 * KVCache.bytes_per_block(tiny_config(), 1, torch.float32)
    before, fits = text_of(await collect(engine, chat("hello", "v1"))), MIB // row
    write_long(folder / "adapters" / "long", fits + 1)
    why = rf"prompts of {fits + 1} rows take \S+ GiB, for each of 128 slots .* prompt_cache_mib 1: raise it"
    for id in ("long", "v1"):
        with pytest.raises(InvalidRequest, match=f"{id}: {why}"):
            await engine.load_adapter(id, "long")
    assert cache.k_LSKGD.shape[2] == 6
    assert [model.id for model in engine.models()] == ["tiny", "v1"]
    assert text_of(await collect(engine, chat("hello", "v1"))) == before

    write_long(folder / "adapters" / "long", fits)
    await engine.load_adapter("long", "long")
    assert cache.k_LSKGD.nbytes + cache.v_LSKGD.nbytes == cache.bytes_of(fits) <= MIB
    assert text_of(await collect(engine, chat("hello", "v1"))) == before
    await engine.stop()


def test_prompts_too_long_for_the_cache_stop_the_start(folder: Path):
    """Also those of an adapter that gets no slot at the start."""
    write_long(folder / "adapters" / "endless", 1024)
    adapters = tuple(f"{id}={folder / 'adapters' / id}" for id in ("v1", "endless"))
    with pytest.raises(ModelError, match="endless: prompts of 1024 rows"):
        build_engine(settings(folder, adapters=adapters, prompt_cache_mib=60, max_hot_adapters=1))


def write_low_rank(folder: Path, rank: int, *targets: LinearName) -> None:
    config = adapter_config("v1").model_copy(update={"lora": LoraConfig(rank=rank, targets=targets)})
    save_adapter(random_adapter(config), folder)


async def test_low_rank_terms_too_large_for_the_bank_are_refused(folder: Path):
    """Also where each of two adapters would fit without the other, which nobody asked for so far."""
    of_all = WorkerSettings.model_fields["max_hot_adapters"].default + 1
    base = tiny_config()
    fits = MIB // (of_all * base.num_layers * 2 * base.hidden_size * 4)
    for id, rank, target in (("large", fits + 1, "wq"), ("fits", fits, "wq"), ("other", 1, "wo")):
        write_low_rank(folder / "adapters" / id, rank, target)
    engine = build_engine(settings(folder, low_rank_mib=1, max_hot_adapters=of_all - 1, adapters=()))
    await engine.start()
    before = text_of(await collect(engine, chat("hello")))
    why = rf"large: .* of rank {fits + 1} .* GiB, as each of {of_all - 1} slots .* low_rank_mib 1"
    with pytest.raises(InvalidRequest, match=why):
        await engine.load_adapter("large", "large")
    await engine.load_adapter("fits", "fits")
    with pytest.raises(
        InvalidRequest, match=r"other: .* low_rank_mib 1: raise it, or lower max_hot_adapters"
    ):
        await engine.load_adapter("other", "other")
    terms = [term for pair in engine._step_loop.runner.bank.lora.values() for term in pair]
    assert sum(term.nbytes for term in terms) <= MIB
    assert [model.id for model in engine.models()] == ["tiny", "fits"]
    assert text_of(await collect(engine, chat("hello", "fits")))
    assert text_of(await collect(engine, chat("hello"))) == before
    await engine.stop()

    adapters = tuple(f"{id}={folder / 'adapters' / id}" for id in ("fits", "other"))
    with pytest.raises(ModelError, match="other: with low-rank terms of rank 1"):  # it gets no slot at once
        build_engine(settings(folder, low_rank_mib=1, adapters=adapters, max_hot_adapters=of_all - 1))


def test_features_of_images_take_what_the_settings_say(folder: Path):
    engine = build_engine(settings(folder, image_cache_mib=3))
    assert engine._step_loop.runner.sight._max_bytes == 3 * MIB


def test_start_up_names_what_is_wrong(folder: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match="no such file"):
        build_engine(settings(folder, base=str(tmp_path / "none")))
    with pytest.raises(StartupError, match="max_model_len"):
        build_engine(settings(folder, max_model_len=100_000))
    with pytest.raises(StartupError, match="prompt_slots"):
        build_engine(settings(folder, prompt_slots=4, max_num_seqs=8))
    with pytest.raises(StartupError, match="device"):
        build_engine(settings(folder, device="nowhere"))
    with pytest.raises(CheckpointError, match="the base's own"):
        build_engine(settings(folder, adapters=(f"tiny={folder / 'adapters' / 'v1'}",)))


def test_an_engine_whose_first_step_fails_does_not_start(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Runner, "run", lambda *step: 1 / 0)
    with pytest.raises(StartupError, match="the warm-up failed, as every request would"):
        build_engine(settings(folder))


def test_an_adapter_for_another_base_is_refused(folder: Path, tmp_path: Path):
    from models.checkpoints.manifest import read_manifest

    config = read_manifest(folder / "adapters" / "v1")
    other = config.model_copy(update={"base": config.base.model_copy(update={"fingerprint": "0" * 16})})
    write_adapter(tmp_path / "v1", "v1")
    (tmp_path / "v1" / "adapter.json").write_text(other.model_dump_json())
    with pytest.raises(AdapterMismatch, match="fingerprint"):
        build_engine(settings(folder, adapters=(f"v1={tmp_path / 'v1'}",)))


def test_float_types_of_the_base(folder: Path):
    for name in ("bfloat16", "float16"):
        engine = build_engine(settings(folder, dtype=name))
        assert engine._step_loop.runner.base.dtype == getattr(torch, name)


async def test_a_client_may_leave_while_its_request_waits_for_the_step_thread(
    engine: NativeEngine, monkeypatch: pytest.MonkeyPatch
):
    """The command that adds it is cancelled; the thread that finds it so goes on."""
    busy, go_on = held_steps(engine, monkeypatch)
    first = asyncio.create_task(collect(engine, chat("first", id="first")))
    assert await asyncio.to_thread(busy.wait, 10)
    leaving = asyncio.create_task(collect(engine, chat("second", id="second")))
    for _ in range(500):
        if not engine._inbox.empty():
            break
        await asyncio.sleep(0.01)
    assert not engine._inbox.empty()
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    go_on.set()
    assert text_of(await first)
    assert engine.healthy
    assert text_of(await collect(engine, chat("third", id="second")))  # the id is free as well
    await settle(engine)
    engine._step_loop.check_integrity()

"""What experts read, and what becomes of those that fail, dawdle or have nothing to say."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from experts.contract import BadImage, Busy, ExpertError, Reading
from server.errors import InvalidRequest
from server.gateway.clients.breaker import CircuitBreaker
from server.gateway.clients.experts import CONFIRM_SECONDS, GuardedExpert, Skipped
from server.worker.messages import ContextItem
from tests.server.gateway.scripted import (
    SEEING_ADAPTER,
    Launch,
    ScriptedExpert,
    ScriptedWorker,
    Stack,
    picture,
    until,
)
from tests.server.gateway.test_image_loading import content, data_url

PICTURE = data_url(picture())


async def ask(gateway: Stack, *urls: str, **fields: Any) -> dict[str, Any]:
    response = await gateway.chat(messages=content(*(urls or (PICTURE,))), **fields)
    assert response.status_code == 200, response.text
    return response.json()


def outcomes(body: dict[str, Any]) -> list[tuple[str, str, str, int]]:
    return [(e["name"], e["outcome"], e["text"], e["image"]) for e in body["experts"]]


async def test_all_are_asked_at_once_and_their_fates_are_told(launch: Launch, worker: ScriptedWorker) -> None:
    both_asked = asyncio.Barrier(2)

    class Together(ScriptedExpert):
        async def read(self, image: bytes) -> Reading:
            await both_asked.wait()
            return await super().read(image)

    experts = {
        "ocr": Together("ocr", " Total $5 \n"),
        "caption": Together("caption", ""),
        "classifier": ScriptedExpert("classifier", BadImage("no image")),
        "broken": ScriptedExpert("broken", ZeroDivisionError()),
        "slow": ScriptedExpert("slow", "late", seconds=30),
    }
    gateway = await launch(worker, experts=experts, expert_seconds=1.0, request_seconds=300)
    body = await ask(gateway)
    assert outcomes(body) == [
        ("ocr", "ok", "Total $5", 0),
        ("caption", "empty", "", 0),
        ("classifier", "failed", "", 0),
        ("broken", "failed", "", 0),
        ("slow", "timeout", "", 0),
    ]
    seconds = {expert["name"]: expert["seconds"] for expert in body["experts"]}
    assert seconds["ocr"] < 1.0 <= seconds["slow"] < 15
    assert 0 < worker.requests[0].timeout_seconds <= 300 - 1.0  # what is left of the request's time
    assert worker.requests[0].prompt.context == (ContextItem("ocr", "Total $5"),)
    assert all(expert.loaded for expert in experts.values())


async def test_the_field_rides_on_a_streams_first_chunk_alone(launch: Launch, worker: ScriptedWorker) -> None:
    gateway = await launch(worker, experts={"ocr": ScriptedExpert("ocr", "x")})
    chunks = await gateway.chunks(messages=content(PICTURE), n=2)
    assert outcomes(chunks[0]) == [("ocr", "ok", "x", 0)]
    assert not any("experts" in chunk for chunk in chunks[1:-1])


async def test_the_caller_chooses(launch: Launch, worker: ScriptedWorker) -> None:
    experts = {name: ScriptedExpert(name, name) for name in ("a", "b", "c")}
    gateway = await launch(worker, experts=experts)
    assert [name for name, *_ in outcomes(await ask(gateway, experts="auto"))] == ["a", "b", "c"]
    assert [name for name, *_ in outcomes(await ask(gateway, experts=["c", "a", "c"]))] == ["c", "a"]
    assert outcomes(await ask(gateway, experts=[])) == []
    unknown = await gateway.chat(messages=content(PICTURE), experts=["a", "zeta"])
    error = unknown.json()["error"]
    assert (unknown.status_code, error["code"], error["param"]) == (400, "expert_not_found", "experts[1]")
    assert "a, b, c" in error["message"]


async def test_a_model_does_not_hear_itself(launch: Launch, worker: ScriptedWorker) -> None:
    """The expert `caption` asks the adapter of that name, which would be asked twice; no other does."""
    worker.models += [replace(SEEING_ADAPTER, id=id) for id in ("caption", "ocr")]
    experts = {name: ScriptedExpert(name, name) for name in ("caption", "ocr")}
    gateway = await launch(worker, experts=experts)
    for model, heard in (("caption", ["ocr"]), ("ocr", ["caption", "ocr"]), ("base", ["caption", "ocr"])):
        assert [name for name, *_ in outcomes(await ask(gateway, model=model))] == heard
        assert [name for name, *_ in outcomes(await ask(gateway, model=model, experts="auto"))] == heard
    named = await ask(gateway, model="caption", experts=["caption"])
    assert [name for name, *_ in outcomes(named)] == ["caption"]  # who names it means it


async def test_without_images_nobody_is_asked(launch: Launch, worker: ScriptedWorker) -> None:
    expert = ScriptedExpert("ocr", "x")
    gateway = await launch(worker, experts={"ocr": expert})
    assert "experts" not in (await gateway.chat()).json()
    assert (await gateway.chat(experts=["ocr"])).json()["experts"] == []
    assert expert.seen == []


async def test_a_prompt_that_readings_make_too_long_is_not_blamed_on_the_caller_alone(
    launch: Launch, worker: ScriptedWorker
) -> None:
    said = "This model's maximum context length is 8 tokens: too long."
    worker.refusal = InvalidRequest(said, param="messages", code="context_length_exceeded")
    gateway = await launch(worker, experts={"ocr": ScriptedExpert("ocr", "x" * 4321)})
    for stream in (False, True):
        answer = await gateway.chat(messages=content(PICTURE), stream=stream)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
        assert error["message"].startswith(said)
        assert "4321 characters" in error["message"]
        assert "`experts`" in error["message"]
    for fields in ({}, {"messages": content(PICTURE), "experts": []}):
        assert (await gateway.chat(**fields)).json()["error"]["message"] == said


async def test_every_image_is_read_and_told_apart(launch: Launch, worker: ScriptedWorker) -> None:
    class Eye(ScriptedExpert):
        async def read(self, image: bytes) -> Reading:
            return Reading("red" if image == picture() else "blue")

    gateway = await launch(worker, experts={"eye": Eye("eye")})
    body = await ask(gateway, PICTURE, data_url(picture(color="blue")))
    assert outcomes(body) == [("eye", "ok", "red", 0), ("eye", "ok", "blue", 1)]
    assert worker.requests[0].prompt.context == (ContextItem("eye", "red"), ContextItem("eye", "blue"))


async def test_equal_images_of_a_request_are_read_once(launch: Launch, worker: ScriptedWorker) -> None:
    class Eye(ScriptedExpert):
        async def read(self, image: bytes) -> Reading:
            await super().read(image)
            return Reading("red" if image == picture() else "blue")

    eye, deaf = Eye("eye", seconds=0.01), ScriptedExpert("deaf", ExpertError("what?"))
    gateway = await launch(worker, experts={"eye": eye, "deaf": deaf}, expert_failures=3)
    blue = data_url(picture(color="blue"))
    assert outcomes(await ask(gateway, PICTURE, blue, PICTURE, PICTURE)) == [
        (name, outcome, text, image)
        for image, color in enumerate(["red", "blue", "red", "red"])
        for name, outcome, text in (("eye", "ok", color), ("deaf", "failed", ""))
    ]
    assert len(eye.seen) == len(deaf.seen) == 2
    latency = 'expert_latency_seconds_count{expert="eye",model="base",outcome="ok"}'
    assert await metric(gateway, latency) == 2


async def test_readings_are_remembered_by_expert_version_and_image(
    launch: Launch, worker: ScriptedWorker
) -> None:
    expert = ScriptedExpert("ocr", "x")
    gateway = await launch(worker, experts={"ocr": expert}, expert_cache_entries=2)
    other, third = data_url(picture(color="blue")), data_url(picture(color="green"))
    for _ in range(3):
        await ask(gateway)
    assert len(expert.seen) == 1
    await ask(gateway, other)
    assert len(expert.seen) == 2
    await ask(gateway)  # the older one, used again, is the younger now
    await ask(gateway, third)
    await ask(gateway)
    assert len(expert.seen) == 3
    await ask(gateway, other)  # was dropped
    assert len(expert.seen) == 4
    expert.version = "2"
    await ask(gateway, other)
    assert len(expert.seen) == 5


async def test_a_new_version_is_noticed_though_every_image_is_known(
    launch: Launch, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("server.gateway.clients.experts.time", SimpleNamespace(monotonic=lambda: now))

    class Deployed(ScriptedExpert):
        """Another process knows its version; it is told when it is asked, and `telling` is set."""

        refreshes = 0
        deployed = "1"

        async def refresh(self) -> None:
            self.refreshes += 1
            await telling.wait()
            if self.deployed == "down":
                raise ExpertError("down")
            self.version = self.deployed

    telling = asyncio.Event()
    expert = Deployed("ocr", "by the first")
    gateway = await launch(worker, experts={"ocr": expert})

    async def text() -> str:
        return outcomes(await ask(gateway))[0][2]

    await text()
    expert.deployed, expert.says = "2", "by the second"
    now += CONFIRM_SECONDS - 1
    assert await text() == "by the first"
    assert expert.refreshes == 0
    for _ in range(2):  # it is asked once at a time, and nobody waits for it
        now += CONFIRM_SECONDS
        assert await text() == "by the first"
        await until(lambda: expert.refreshes == 1)
    telling.set()
    await until(lambda: expert.version == "2")
    assert await text() == "by the second"
    assert len(expert.seen) == 2
    now += CONFIRM_SECONDS - 1  # since that reading, which confirmed it
    expert.deployed = "down"
    assert await text() == "by the second"
    assert expert.refreshes == 1
    now += 1
    assert await text() == "by the second"
    await until(lambda: expert.refreshes == 2)
    assert await text() == "by the second"
    assert (len(expert.seen), expert.refreshes) == (2, 2)


async def test_a_reading_during_a_change_of_version_is_not_remembered(
    launch: Launch, worker: ScriptedWorker
) -> None:
    class Changing(ScriptedExpert):
        async def read(self, image: bytes) -> Reading:
            reading = await super().read(image)
            self.version = "2"
            return reading

    expert = Changing("caption", "by the first version")
    gateway = await launch(worker, experts={"caption": expert})
    await ask(gateway)
    expert.says = "by the second"
    assert outcomes(await ask(gateway)) == [("caption", "ok", "by the second", 0)]
    await ask(gateway)
    assert len(expert.seen) == 2


async def test_failures_are_not_remembered(launch: Launch, worker: ScriptedWorker) -> None:
    expert = ScriptedExpert("ocr", ExpertError("busy"))
    gateway = await launch(worker, experts={"ocr": expert})
    assert outcomes(await ask(gateway))[0][1] == "failed"
    expert.says = "better"
    assert outcomes(await ask(gateway))[0][1] == "ok"


async def metric(gateway: Stack, name: str) -> float:
    lines = (await gateway.http.get("/metrics")).text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(f"llama_adapter:{name} "))


async def test_an_expert_that_keeps_failing_is_left_alone_until_a_probe_succeeds(
    launch: Launch, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("server.gateway.clients.experts.time", SimpleNamespace(monotonic=lambda: now))
    expert = ScriptedExpert("ocr", ExpertError("down"))
    gateway = await launch(worker, experts={"ocr": expert}, expert_failures=2, expert_pause_seconds=10)

    async def outcome() -> str:
        return outcomes(await ask(gateway))[0][1]

    circuit = 'expert_circuit_open{expert="ocr"}'
    assert await metric(gateway, circuit) == 0
    assert [await outcome() for _ in range(4)] == ["failed", "failed", "skipped", "skipped"]
    assert len(expert.seen) == 2
    assert await metric(gateway, circuit) == 1
    skipped = 'expert_latency_seconds_count{expert="ocr",model="base",outcome="skipped"}'
    assert await metric(gateway, skipped) == 2
    now += 9.9
    assert await outcome() == "skipped"
    now += 0.1
    assert [await outcome(), await outcome()] == ["failed", "skipped"]  # the probe, and the next pause
    now += 10
    expert.says = "better"
    assert await outcome() == "ok"
    assert await metric(gateway, circuit) == 0
    assert len(expert.seen) == 4


async def test_an_image_that_cannot_be_read_is_no_failure_of_the_expert(
    launch: Launch, worker: ScriptedWorker
) -> None:
    gateway = await launch(worker, experts={"ocr": ScriptedExpert("ocr", BadImage("x"))}, expert_failures=1)
    assert [outcomes(await ask(gateway))[0][1] for _ in range(3)] == ["failed"] * 3


async def test_a_busy_expert_has_neither_failed_nor_answered(launch: Launch, worker: ScriptedWorker) -> None:
    expert = ScriptedExpert("ocr", Busy("too many wait"))
    gateway = await launch(worker, experts={"ocr": expert}, expert_failures=2)
    fates = []
    for expert.says in [Busy("later")] * 3 + [ExpertError("down"), Busy("later"), ExpertError("down"), "x"]:
        fates.append(outcomes(await ask(gateway))[0][1])
    assert fates == ["failed"] * 6 + ["skipped"]


async def test_so_many_readings_at_once(launch: Launch, worker: ScriptedWorker) -> None:
    class Counting(ScriptedExpert):
        running = most = 0

        async def read(self, image: bytes) -> Reading:
            self.running += 1
            self.most = max(self.most, self.running)
            reading = await super().read(image)
            self.running -= 1
            return reading

    expert = Counting("ocr", "x", seconds=0.05)
    gateway = await launch(worker, experts={"ocr": expert}, expert_concurrency=2, expert_cache_entries=0)
    await asyncio.gather(*(ask(gateway) for _ in range(6)))
    assert expert.most == 2
    assert len(expert.seen) == 6


async def test_a_cache_of_no_entries(launch: Launch, worker: ScriptedWorker) -> None:
    expert = ScriptedExpert("ocr", "x")
    gateway = await launch(worker, experts={"ocr": expert}, expert_cache_entries=0)
    for _ in range(2):
        await ask(gateway)
    assert len(expert.seen) == 2


async def test_an_expert_that_cannot_load_does_not_stop_the_gateway(
    launch: Launch, worker: ScriptedWorker
) -> None:
    class Unloadable(ScriptedExpert):
        async def load(self) -> None:
            raise ExpertError("its service is away")

    gateway = await launch(
        worker, experts={"lost": Unloadable("lost", "x"), "ocr": ScriptedExpert("ocr", "y")}
    )
    assert [outcome for _, outcome, *_ in outcomes(await ask(gateway))] == ["failed", "ok"]


async def test_an_expert_that_loads_for_long_is_waited_for_by_its_readings_alone(
    launch: Launch, worker: ScriptedWorker
) -> None:
    go_on = asyncio.Event()

    class Slow(ScriptedExpert):
        async def load(self) -> None:
            await go_on.wait()
            self.loaded = True

        async def read(self, image: bytes) -> Reading:
            assert self.loaded
            return await super().read(image)

    gateway = await launch(worker, experts={"ocr": Slow("ocr", "x")}, expert_seconds=0.2)
    assert (await gateway.chat()).status_code == 200
    assert outcomes(await ask(gateway))[0][1] == "timeout"
    go_on.set()  # the waiting was given up above, the loading was not
    assert outcomes(await ask(gateway))[0][1] == "ok"


async def test_a_probe_whose_client_left_leaves_it_to_the_next() -> None:
    expert = ScriptedExpert("ocr", ExpertError("down"))
    guarded = GuardedExpert(expert, 5, 1, CircuitBreaker(threshold=1, pause=0.0))
    guarded.start()
    with pytest.raises(ExpertError):
        await guarded.read(b"x")
    assert guarded.circuit_open
    expert.says, expert.seconds = "better", 60
    probe = asyncio.create_task(guarded.read(b"x"))
    await until(lambda: len(expert.seen) == 2)
    with pytest.raises(Skipped):
        await guarded.read(b"x")
    probe.cancel()
    await asyncio.gather(probe, return_exceptions=True)
    assert guarded.circuit_open  # it has told nothing
    expert.seconds = 0
    assert (await guarded.read(b"x")).text == "better"
    assert not guarded.circuit_open
    await guarded.close()


async def test_who_was_not_asked_yet_has_not_failed() -> None:
    """It loads, or has others before: that it is late says nothing of its next answer."""
    loaded = asyncio.Event()

    class Loading(ScriptedExpert):
        async def load(self) -> None:
            await loaded.wait()

    expert = Loading("ocr", "x", seconds=60)
    guarded = GuardedExpert(expert, 0.05, 1, CircuitBreaker(threshold=1, pause=60))
    guarded.start()
    with pytest.raises(TimeoutError):
        await guarded.read(b"x")
    assert expert.seen == []
    assert not guarded.circuit_open
    loaded.set()
    with pytest.raises(TimeoutError):
        await guarded.read(b"x")
    assert guarded.circuit_open
    await guarded.close()


async def test_who_answered_others_meanwhile_has_not_failed() -> None:
    """A service reads one picture after another: those at the back of its queue are late, it is well."""
    one_at_a_time = asyncio.Lock()
    last = b"the last one that it gets to"

    class Queueing(ScriptedExpert):
        async def read(self, image: bytes) -> Reading:
            async with one_at_a_time:
                self.seconds = 60 if image == last else 0
                return await super().read(image)

    guarded = GuardedExpert(Queueing("ocr", "x"), 1, 8, CircuitBreaker(threshold=1, pause=60))
    guarded.start()
    pictures = (b"quick", last, b"behind it", b"and this")
    fates = await asyncio.gather(*map(guarded.read, pictures), return_exceptions=True)
    assert fates[0] == Reading("x")
    assert [type(fate) for fate in fates[1:]] == [TimeoutError] * 3
    assert not guarded.circuit_open
    with pytest.raises(TimeoutError):
        await guarded.read(last)
    assert guarded.circuit_open
    await guarded.close()

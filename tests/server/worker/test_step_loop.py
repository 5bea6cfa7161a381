"""Whatever shares a step with a request, its tokens are those it gets alone."""

from __future__ import annotations

import random
import time
from collections.abc import Generator
from dataclasses import replace

import pytest
import torch
from support import CONFIGS, random_adapter, random_base

from models.adaptation import OneAdapter
from models.adapter import Adapter, base_spec
from models.adapter_config import (
    AdapterConfig,
    GateConfig,
    LoraConfig,
    PromptConfig,
    ScaleBiasConfig,
    VisionConfig,
)
from models.attention import DenseAttend
from models.llama import Llama
from server.worker.blocks import BlockManager
from server.worker.messages import (
    Delta,
    Failed,
    Finished,
    PromptScored,
    SamplingParams,
    Scheduled,
    Usage,
    join_scores,
)
from server.worker.pace import Pace
from server.worker.request import Prepared
from server.worker.runner import Runner, StepItem
from server.worker.sampler import Choice
from server.worker.scheduler import Scheduler, SequenceRejected
from server.worker.sight import ImageInput, ImageQueue, LoadedAdapter, Sight
from server.worker.step_loop import StepLoop


class Bytes:
    """A tokenizer of one token per byte value below the vocabulary's size; 1 ends an answer."""

    eos_ids = frozenset({1})
    strips_leading_space = False

    def token_bytes(self, id: int) -> bytes:
        return bytes([id])

    def partial_bytes(self, id: int) -> None:
        return None

    def token_text(self, id: int) -> str:
        return chr(id)

    def decode(self, ids) -> str:
        return bytes(ids).decode(errors="replace")


class ToyEncoder:
    """Features that depend on every pixel; stands where a real encoder would."""

    name, version, image_size = "toy", "1", 4
    token_dim, num_tokens, global_dim = 48, 1, 48

    def __init__(self) -> None:
        self.calls = 0

    def global_features(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        return pixels_BCHW.flatten(1)

    def by_layers(self, features: str, pixels_BCHW: torch.Tensor) -> Generator[None, None, torch.Tensor]:
        assert features == "global"
        self.calls += 1
        for _ in range(3):
            yield
        return self.global_features(pixels_BCHW)


FEATURES = ToyEncoder.global_dim * 4  # bytes of an image's


def adapter_configs(base: Llama) -> list[AdapterConfig]:
    """V1, V2 text with scale after, V2 text with scale before and LoRA, V1 and V2 multimodal."""
    spec = base_spec(base.config)
    C = base.config.hidden_size
    look = {
        "encoder": "efficientnet-lite0",
        "features": "global",
        "projector": "linear",
        "feature_dim": 48,
        "hidden_size": C,
    }
    every = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
    return [
        AdapterConfig(base=spec, prompt=PromptConfig(length=5, layers=(2, 3))),
        AdapterConfig(
            base=spec,
            prompt=PromptConfig(length=10, layers=(1, 2, 3)),
            gate=GateConfig(activation="raw"),
            norms=True,
            final_norm=True,
            scale_bias=ScaleBiasConfig(scale="output", scale_targets=every, bias_targets=every),
        ),
        AdapterConfig(
            base=spec,
            scale_bias=ScaleBiasConfig(scale="input", scale_targets=every, bias_targets=("wq", "w2")),
            lora=LoraConfig(rank=3, targets=("wq", "wo", "w3")),
        ),
        AdapterConfig(
            base=spec,
            prompt=PromptConfig(length=4, layers=(1, 2, 3)),
            vision=VisionConfig(fusion="add", layers=(2, 3), num_tokens=1, **look),
        ),
        AdapterConfig(
            base=spec,
            prompt=PromptConfig(length=3, layers=(2, 3)),
            norms=True,
            vision=VisionConfig(fusion="early", layers=(0,), num_tokens=7, **look),
        ),
    ]


class Deployment:
    """A base with adapters, and the plain path: the whole sequence again for each token."""

    def __init__(self, name: str = "gqa", dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        self.base = random_base(CONFIGS[name], dtype).to(device)
        self.encoder = ToyEncoder()
        self.adapters: list[LoadedAdapter | None] = [None]
        for i, config in enumerate(adapter_configs(self.base)):
            adapter = random_adapter(config, seed=i).to(device)
            self.adapters.append(
                LoadedAdapter((f"a{i}", 1), adapter, self.encoder if config.vision else None)
            )

    def loop(
        self,
        *,
        num_blocks=64,
        budget=64,
        seqs=16,
        hot=16,
        prompts=16,
        prefix_caching=True,
        pace=None,
        overlap=False,
        kernels="cpu",
    ) -> StepLoop:
        runner = Runner(
            self.base,
            num_blocks=num_blocks,
            block_size=4,
            max_hot_adapters=hot,
            prompt_slots=prompts,
            kernels=kernels,
            max_decodes=seqs,
            max_model_len=200,
        )
        scheduler = Scheduler(
            BlockManager(num_blocks, 4, prefix_caching),
            max_num_seqs=seqs,
            max_num_batched_tokens=budget,
            max_model_len=200,
            pace=pace,
        )
        return StepLoop(runner, scheduler, Bytes(), overlap)  # type: ignore[arg-type]

    @torch.no_grad()
    def logits(self, prepared: Prepared, tokens: list[int]) -> torch.Tensor:
        """[N, V] in float32 by the training-time forward pass, without any cache."""
        adapter: Adapter | None = prepared.adapter.adapter if prepared.adapter else None
        prompts = adaptation = None
        if adapter is not None:
            visual = None
            if prepared.image is not None:
                visual = adapter.see(self.encoder.global_features(prepared.image.pixels[None]))
            prompts = adapter.prompts(self.base, visual)
            adaptation = OneAdapter(adapter, self.base.dtype)
        positions = torch.arange(len(tokens))
        hidden = self.base(torch.tensor(tokens), positions, DenseAttend(1, prompts), adaptation)
        return self.base.logits(hidden, adaptation).float()

    def alone(self, prepared: Prepared) -> list[int]:
        """Greedy tokens: the whole sequence again for each."""
        tokens = list(prepared.token_ids)
        while len(tokens) - len(prepared.token_ids) < prepared.max_tokens:
            tokens.append(int(self.logits(prepared, tokens)[-1].argmax()))
            if tokens[-1] == 1:
                break
        return tokens[len(prepared.token_ids) :]

    def request(self, i: int, rng: random.Random, **changes) -> Prepared:
        adapter = self.adapters[rng.randrange(len(self.adapters))]
        image = None
        if adapter is not None and adapter.encoder is not None and rng.random() < 0.8:
            pixels = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(rng.randrange(3)))
            image = ImageInput(str(pixels.flatten()[0].item()), pixels)
        prefix = [5, 9, 2, 7] * rng.randrange(4)  # shared between requests: cache hits
        params = SamplingParams(temperature=0)
        prepared = Prepared(
            request_id=str(i),
            token_ids=prefix + [rng.randrange(2, 97) for _ in range(rng.randrange(1, 20))],
            sampling=params,
            max_tokens=rng.randrange(1, 14),
            stop=(),
            adapter=adapter,
            image=image,
        )
        return replace(prepared, **changes)


def run(loop: StepLoop, requests: list[Prepared], arrivals: random.Random | None = None) -> dict[str, list]:
    """All requests' events, the requests arriving at random steps."""
    events: dict[str, list] = {r.request_id: [] for r in requests}
    waiting = list(requests)
    while waiting or loop.has_work:
        while waiting and (arrivals is None or not loop.has_work or arrivals.random() < 0.5):
            request = waiting.pop(0)
            loop.add(request, events[request.request_id].append)
        loop.step()
        loop.check_integrity()
    return events


def scores_of(events: list) -> list[PromptScored]:
    return [event for event in events if isinstance(event, PromptScored)]


def tokens_of(events: list) -> list[int]:
    return [token for event in events if isinstance(event, Delta) for token in event.token_ids]


def without_eos(tokens: list[int]) -> list[int]:
    return tokens[:-1] if tokens[-1] == 1 else tokens


POOLS = {
    "roomy": {},
    "chunks of 5": {"budget": 5, "seqs": 4},
    "preempting": {"num_blocks": 18, "seqs": 8},
    "no prefix cache": {"prefix_caching": False},
    "paced": {"pace": Pace(stretch=1.1, least=1, first=3)},
    "few slots": {"seqs": 2, "hot": 2, "prompts": 2},
    "told later": {"overlap": True},
    "preempting, told later": {"num_blocks": 12, "seqs": 8, "overlap": True},
    "chunks of 5, told later": {"budget": 5, "seqs": 4, "overlap": True},
    "few slots, told later": {"seqs": 2, "hot": 2, "prompts": 2, "overlap": True},
    "paced, told later": {"pace": Pace(stretch=1.1, least=1, first=3), "overlap": True},
}


@pytest.mark.parametrize("name", sorted(CONFIGS))
@pytest.mark.parametrize("pool", POOLS)
def test_tokens_equal_those_of_the_request_alone(name: str, pool: str):
    deployment = Deployment(name)
    loop = deployment.loop(**POOLS[pool])
    rng = random.Random(f"{name} {pool}")
    requests = [deployment.request(i, rng) for i in range(24)]
    events = run(loop, requests, arrivals=rng)
    for request in requests:
        assert isinstance(events[request.request_id][-1], Finished)
        assert tokens_of(events[request.request_id]) == without_eos(deployment.alone(request))
    stats = loop.stats()
    assert stats.kv_blocks_used == 0
    assert stats.running == stats.waiting == 0
    assert (stats.preemptions > 0) == ("preempting" in pool)
    assert (stats.prefix_cache_hits > 0) == (pool != "no prefix cache")


@pytest.mark.parametrize("overlap", [False, True])
def test_neither_an_end_token_nor_a_stop_string_ends_the_first_tokens(overlap: bool):
    deployment = Deployment()
    for token, stop in ((1, ()), (50, (chr(50),))):
        params = SamplingParams(temperature=0, min_tokens=3, logit_bias={token: 100.0})
        request = deployment.request(0, random.Random(0), sampling=params, stop=stop, max_tokens=9)
        events = run(deployment.loop(overlap=overlap), [request])["0"]
        assert len(tokens_of(events)) == 3
        assert events[-1] == Finished("stop", Usage(len(request.token_ids), 4))


def test_an_image_is_encoded_once():
    deployment = Deployment()
    loop = deployment.loop(prompts=16)
    image = ImageInput("x", torch.ones(3, 4, 4))
    sees = deployment.adapters[-1]
    requests = [
        deployment.request(i, random.Random(i), adapter=sees, image=image, max_tokens=3) for i in range(6)
    ]
    run(loop, requests)
    assert deployment.encoder.calls == 1


def test_decodes_go_on_while_an_image_is_encoded():
    deployment = Deployment()
    pace = Pace(stretch=1.0)  # no time to spare: a layer a step
    loop = deployment.loop(pace=pace)
    pace.observe(1, 0, 0.001)
    sees, image = deployment.adapters[-1], ImageInput("x", torch.ones(3, 4, 4))
    quick = replace(deployment.request(0, random.Random(0), adapter=None, image=None), max_tokens=12)
    seeing = deployment.request(1, random.Random(1), adapter=sees, image=image, max_tokens=3)
    events: dict[str, list] = {"0": [], "1": []}
    loop.add(quick, events["0"].append)
    loop.step()
    loop.add(seeing, events["1"].append)
    assert loop.stats().waiting == 1
    for _ in range(3):
        decoded = len(tokens_of(events["0"]))
        loop.step()
        loop.check_integrity()
        assert len(tokens_of(events["0"])) == decoded + 1
        assert events["1"] == []
    while loop.has_work:
        loop.step()
    assert deployment.encoder.calls == 1
    for request in (quick, seeing):
        assert tokens_of(events[request.request_id]) == without_eos(deployment.alone(request))


def test_a_request_may_leave_while_its_image_is_encoded():
    deployment = Deployment()
    pace = Pace(stretch=1.0)
    loop = deployment.loop(pace=pace)
    pace.observe(1, 0, 0.001)
    sees, image = deployment.adapters[-1], ImageInput("x", torch.ones(3, 4, 4))
    quick = replace(deployment.request(0, random.Random(0), adapter=None, image=None), max_tokens=12)
    seeing = [deployment.request(i, random.Random(i), adapter=sees, image=image) for i in (1, 2)]
    loop.add(quick, lambda event: None)
    loop.step()
    for request in seeing:
        loop.add(request, lambda event: None)
    for twin in (seeing[0], replace(seeing[0], adapter=None, image=None)):  # which would not wait
        with pytest.raises(SequenceRejected, match="running already"):
            loop.add(twin, lambda event: None)
    loop.step()
    loop.abort("1")
    loop.check_integrity()
    assert loop.stats().waiting == 1
    while loop.has_work:
        loop.step()
        loop.check_integrity()
    assert deployment.encoder.calls == 1


def test_images_whose_requests_left_stay_within_the_cache():
    """Nobody asks for their features any more: what is encoded for them must make room by itself."""
    deployment = Deployment()
    pace = Pace(stretch=1.0)
    loop = deployment.loop(pace=pace)
    pace.observe(1, 0, 0.001)
    sight = loop.runner.sight
    sight._max_bytes = 2 * FEATURES
    sees = deployment.adapters[-1]
    quick = replace(deployment.request(0, random.Random(0), adapter=None, image=None), max_tokens=40)
    loop.add(quick, lambda event: None)
    loop.step()
    for i in range(1, 7):
        image = ImageInput(str(i), torch.full((3, 4, 4), float(i)))
        loop.add(deployment.request(i, random.Random(i), adapter=sees, image=image), lambda event: None)
        loop.step()  # its first layer
        loop.abort(str(i))
        waiting = replace(image, key=f"{i} again")
        loop.add(
            deployment.request(100 + i, random.Random(i), adapter=sees, image=waiting), lambda event: None
        )
        for _ in range(3):
            loop.step()
        loop.abort(str(100 + i))
        sight.check_integrity()
        assert len(sight._features) <= 2
    assert deployment.encoder.calls == 6


def test_a_forgotten_adapter_leaves_no_encoding_under_way():
    """The next image may be long from now, and until then its encoder would stay in memory."""
    deployment = Deployment()
    pace = Pace(stretch=1.0)
    loop = deployment.loop(pace=pace)
    pace.observe(1, 0, 0.001)
    quick = replace(deployment.request(0, random.Random(0), adapter=None, image=None), max_tokens=40)
    loop.add(quick, lambda event: None)
    loop.step()
    sees, image = deployment.adapters[-1], ImageInput("x", torch.ones(3, 4, 4))
    loop.add(deployment.request(1, random.Random(1), adapter=sees, image=image), lambda event: None)
    loop.step()  # its first layer
    loop.abort("1")
    assert loop._images._layers is not None
    loop.forget(sees.key)
    assert loop._images._layers is None


def test_a_layer_has_ended_when_the_device_is_done_with_it(monkeypatch: pytest.MonkeyPatch):
    """A GPU takes all layers of an image at once, and computes them when the clock is read no more."""
    deployment = Deployment()
    queue = ImageQueue(Sight(deployment.base.device, 1 << 20))
    queue.put("r", deployment.adapters[-1], ImageInput("x", torch.ones(3, 4, 4)))  # type: ignore[arg-type]
    monkeypatch.setattr("server.worker.sight.check_device", lambda device: time.sleep(0.05))
    assert queue.work(0.04) == ([], [])  # one layer took that long
    assert queue.work(10) == (["r"], [])


def sizes_of_batches(encoder: ToyEncoder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each call of the encoder has got, as it goes on."""
    sizes: list[int] = []
    by_layers = encoder.by_layers

    def counted(features: str, pixels_BCHW: torch.Tensor) -> Generator[None, None, torch.Tensor]:
        sizes.append(len(pixels_BCHW))
        return by_layers(features, pixels_BCHW)

    monkeypatch.setattr(encoder, "by_layers", counted)
    return sizes


def test_a_crowd_of_images_is_encoded_in_batches(monkeypatch: pytest.MonkeyPatch):
    """All at once they would take gigabytes, and minutes in which nobody is answered."""
    deployment = Deployment()
    sizes = sizes_of_batches(deployment.encoder, monkeypatch)
    requests = [
        deployment.request(
            i,
            random.Random(i),
            adapter=deployment.adapters[-1],
            image=ImageInput(str(i), torch.full((3, 4, 4), float(i))),
        )
        for i in range(40)
    ]
    loop = deployment.loop()
    events: dict[str, list] = {request.request_id: [] for request in requests}
    for request in requests:
        loop.add(request, events[request.request_id].append)
    loop.step()
    assert sizes == [16]
    assert isinstance(events["0"][0], Scheduled)
    while loop.has_work:
        loop.step()
    assert sizes == [16, 16, 8]
    assert all(isinstance(told[-1], Finished) for told in events.values())


def test_a_cached_image_keeps_no_batch():
    deployment = Deployment()
    sees = deployment.adapters[-1]
    sight = deployment.loop().runner.sight
    sight._max_bytes = 2 * FEATURES
    images = [ImageInput(str(i), torch.full((3, 4, 4), float(i))) for i in range(5)]
    seen = sight.see(sees, images)
    assert torch.equal(seen, torch.stack([image.pixels.flatten() for image in images]))
    sight.see(sees, images[:1])
    for feature in sight._features.values():
        assert feature.untyped_storage().nbytes() == feature.numel() * feature.element_size()
    assert len(sight._features) == 2
    sight.check_integrity()


def test_the_largest_features_that_fit_are_few():
    """What counts is what they take, not how many they are: a large encoder's tokens are a megabyte."""
    deployment = Deployment()
    sees, sight = deployment.adapters[-1], deployment.loop().runner.sight
    sight._max_bytes = 10 * FEATURES
    small = [ImageInput(str(i), torch.full((3, 4, 4), float(i))) for i in range(10)]
    large = [ImageInput(f"large {i}", torch.full((3, 8, 8), float(i))) for i in range(3)]  # each as four
    sight.see(sees, small)
    assert all(sight.knows(sees, image) for image in small)
    for image in large:
        sight.see(sees, [image])
    assert [image.key for image in (*small, *large) if sight.knows(sees, image)] == ["large 1", "large 2"]
    sight.check_integrity()


def test_features_that_have_gone_are_made_again_in_batches(monkeypatch: pytest.MonkeyPatch):
    """Of all requests that a step admits, whose images made room for each other's while they waited."""
    deployment = Deployment()
    sizes = sizes_of_batches(deployment.encoder, monkeypatch)
    loop = deployment.loop(prompts=40)
    loop.runner.sight._max_bytes = 20 * FEATURES
    adapter = deployment.adapters[-1]
    images = [ImageInput(str(i), torch.full((3, 4, 4), i / 40)) for i in range(40)]
    requests = [
        deployment.request(i, random.Random(i), adapter=adapter, image=image)
        for i, image in enumerate(images)
    ]
    loop.runner.sight.see(adapter, images)
    assert sizes == [16, 16, 8]
    sizes.clear()
    items = [StepItem([3], 0, [i], adapter, image, slice(0, 1)) for i, image in enumerate(images)]
    logits_MV = loop.runner.run(items)
    assert sizes == [16, 4]  # those of the last twenty were there
    for request, row_V in zip(requests, logits_MV, strict=True):
        torch.testing.assert_close(row_V, deployment.logits(request, [3])[0], rtol=1e-4, atol=1e-4)


def test_aborted_requests_give_their_blocks_back_before_the_next_step():
    deployment = Deployment()
    loop = deployment.loop()
    requests = [deployment.request(i, random.Random(i), max_tokens=50) for i in range(4)]
    for request in requests:
        loop.add(request, lambda event: None)
    loop.step()
    assert loop.stats().running == 4
    for request in requests:
        loop.abort(request.request_id)
    assert loop.stats().kv_blocks_used == 0
    assert not loop.has_work
    loop.check_integrity()


def test_what_is_told_later_is_the_same():
    """A stop string is found when the next step runs already, whose token then counts for nothing."""
    deployment = Deployment()
    requests = [deployment.request(i, random.Random(i), max_tokens=30) for i in range(8)]
    for i, request in enumerate(requests[:6]):
        texts = [
            event.text for event in run(deployment.loop(), [request])[str(i)] if isinstance(event, Delta)
        ]
        requests[i] = replace(request, stop=("".join(texts)[4:6],))
    usual, later = (told(deployment.loop(overlap=overlap), requests) for overlap in (False, True))
    assert later == usual
    assert sum(events[-1].finish_reason == "stop" for events in later.values()) >= 6


def test_what_is_told_later_is_delivered_while_the_next_step_runs():
    deployment = Deployment()
    loop = deployment.loop(overlap=True)
    request = deployment.request(0, random.Random(0), adapter=None, max_tokens=5)
    events: list = []
    loop.add(request, events.append)
    delivered: list[int] = []
    while loop.has_work:
        loop.step(lambda: delivered.append(len(tokens_of(events))))
    assert delivered == [0, 1, 2, 3, 4]
    assert len(tokens_of(events)) == 5


SAMPLINGS = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.8, top_p=0.7),
    SamplingParams(temperature=1.2, top_k=5),
    SamplingParams(temperature=1.0, min_p=0.1, min_tokens=8, logit_bias={1: 5.0}),
    SamplingParams(temperature=0),
]
HELD_BACK = [  # the next token depends on what the host knows of the last, or is to be told with it
    SamplingParams(temperature=1.0, frequency_penalty=0.5),
    SamplingParams(temperature=0, repetition_penalty=1.3),
    SamplingParams(temperature=0.5, logprobs=2),
    SamplingParams(temperature=0, prompt_logprobs=1),
]


def told(loop: StepLoop, requests: list[Prepared], arrivals: random.Random | None = None) -> dict[str, list]:
    """All that the requests are told, but for how long they waited and for numbers, whose last digits depend
    on what shares a step."""
    kept = (Delta, Finished, Failed)
    return {
        key: [replace(e, logprobs=()) if isinstance(e, Delta) else e for e in own if isinstance(e, kept)]
        for key, own in run(loop, requests, arrivals).items()
    }


@pytest.mark.parametrize("samplings", [SAMPLINGS, SAMPLINGS + HELD_BACK], ids=["ahead", "ahead and not"])
def test_what_runs_ahead_draws_the_same(samplings: list[SamplingParams]):
    deployment, rng = Deployment(), random.Random(3)
    requests = [
        deployment.request(i, rng, sampling=replace(rng.choice(samplings), seed=i), max_tokens=12)
        for i in range(24)
    ]
    usual, ahead = (
        told(deployment.loop(overlap=overlap, seqs=6), requests, random.Random(5))
        for overlap in (False, True)
    )
    assert ahead == usual


def test_a_step_takes_tokens_that_nobody_has_read(monkeypatch: pytest.MonkeyPatch):
    """All that can, and none once a request must be known to the host."""
    deployment = Deployment()
    loop = deployment.loop(overlap=True)
    unread: list[int] = []
    step = loop.runner.run

    def watched(items, last=None):
        unread.append(sum(item.tokens[0] < 0 for item in items))
        return step(items, last)

    monkeypatch.setattr(loop.runner, "run", watched)
    ignoring = SamplingParams(temperature=0, ignore_eos=True)
    requests = [
        deployment.request(i, random.Random(i), image=None, sampling=ignoring, max_tokens=6) for i in range(3)
    ]
    run(loop, requests)
    assert unread == [0, 3, 3, 3, 3, 3]
    unread.clear()
    requests[0] = replace(requests[0], sampling=replace(ignoring, presence_penalty=0.1), max_tokens=3)
    run(loop, requests)
    assert unread == [0, 0, 0, 0, 2, 2]


def test_nothing_is_left_unread_while_an_image_is_encoded():
    """It would come late, and the encoding would count as the step's time, which lets more of it in."""
    deployment, pace = Deployment(), Pace(stretch=1.0)
    loop = deployment.loop(overlap=True, pace=pace)
    pace.observe(1, 0, 0.001)
    events: list = []
    loop.add(deployment.request(0, random.Random(0), adapter=None, max_tokens=4), events.append)
    loop.step()
    sees, image = deployment.adapters[-1], ImageInput("x", torch.ones(3, 4, 4))
    loop.add(deployment.request(1, random.Random(1), adapter=sees, image=image), lambda event: None)
    encode, seen = loop._encode_images, []
    loop._encode_images = lambda: (seen.append(len(tokens_of(events))), encode())  # type: ignore[method-assign]
    loop.step()
    loop.step()
    assert seen == [1, 2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("number", [0, 1, 2, 3], ids=["base", "V1", "V2", "low rank"])
def test_a_step_on_a_gpu_waits_for_nothing_but_tokens(number: int):
    deployment = Deployment(dtype=torch.bfloat16, device="cuda")
    loop = deployment.loop(overlap=True, kernels="triton")
    samplings = [
        SamplingParams(temperature=0, ignore_eos=True),
        SamplingParams(temperature=1, ignore_eos=True, top_k=40, top_p=0.9),
        SamplingParams(temperature=1, min_p=0.1, min_tokens=60, logit_bias={5: 2.0}),
    ]

    def add(i: int) -> None:
        request = deployment.request(i, random.Random(i), sampling=samplings[i % 3], max_tokens=60)
        loop.add(replace(request, adapter=deployment.adapters[number], image=None), lambda event: None)

    for first in (0, 3):  # prompts, alone and beside decodes, and graphs that are recorded
        for i in range(3):
            add(first + i)
        for _ in range(4):
            loop.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(8):
            if step == 4:
                add(6)
            loop.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loop.num_steps == 16


def test_tokens_that_cannot_be_read_end_their_requests_only(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    deployment = Deployment()
    loop = deployment.loop(overlap=True)
    requests = [deployment.request(i, random.Random(i), max_tokens=5) for i in range(3)]
    lost, kept = requests[:2], requests[2]
    events: dict[str, list] = {request.request_id: [] for request in requests}
    for request in lost:
        loop.add(request, events[request.request_id].append)
    loop.step()
    loop.add(kept, events[kept.request_id].append)
    with monkeypatch.context() as broken:
        broken.setattr(Choice, "read", lambda choice: 1 / 0)
        loop.step()
    while loop.has_work:
        loop.step()
        loop.check_integrity()
    assert all(isinstance(events[request.request_id][-1], Failed) for request in lost)
    again = run(loop, lost)  # nothing of the lost step is found in the cache
    for request in lost:
        assert again[request.request_id][-1].usage.cached_tokens == 0
    assert tokens_of(events[kept.request_id]) == without_eos(deployment.alone(kept))
    assert loop.stats().kv_blocks_used == 0
    assert "ZeroDivisionError" in caplog.text


def test_a_prompt_that_a_lost_step_had_is_scored_no_further(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    deployment = Deployment()
    loop = deployment.loop(overlap=True, budget=8, seqs=4)
    sampling = SamplingParams(temperature=0, ignore_eos=True)
    decodes = deployment.request(0, random.Random(0), token_ids=[5], sampling=sampling, max_tokens=20)
    scoring = SamplingParams(temperature=0, prompt_logprobs=1)
    scored = deployment.request(1, random.Random(1), image=None, token_ids=[5] * 40, sampling=scoring)
    events: list = []
    loop.add(decodes, lambda event: None)
    loop.step()
    loop.add(scored, events.append)
    loop.step()
    loop.step()
    with monkeypatch.context() as broken:
        broken.setattr(Choice, "read", lambda choice: 1 / 0)
        loop.step()
    while loop.has_work:
        loop.step()
    assert [isinstance(event, Failed) for event in events].index(True) == len(events) - 1
    assert "ZeroDivisionError" in caplog.text


def test_a_step_begins_when_the_one_before_it_is_done(monkeypatch: pytest.MonkeyPatch):
    """It is given to the device while that computes another; only the device takes time here."""
    deployment, pace = Deployment(), Pace()
    loop = deployment.loop(overlap=True, pace=pace)
    now = 0.0

    def read(choice: Choice, read=Choice.read) -> tuple[list[int], list[bool]]:
        nonlocal now
        now += 1.0
        return read(choice)

    monkeypatch.setattr(Choice, "read", read)
    monkeypatch.setattr("server.worker.step_loop.time.perf_counter", lambda: now)
    told: list[tuple[int, int, float]] = []
    pace.observe = lambda *step: told.append(step)  # type: ignore[method-assign]
    sampling = SamplingParams(temperature=0, ignore_eos=True)
    request = deployment.request(0, random.Random(0), adapter=None, sampling=sampling, max_tokens=5)
    run(loop, [request])
    told = [step for step in told if step[:2] != (0, 0)]  # where tokens are read and nothing is computed
    assert told == [(0, len(request.token_ids), 1.0)] + [(1, 0, 1.0)] * 4


def test_time_that_images_take_is_taken_off_the_prompts(monkeypatch: pytest.MonkeyPatch):
    """Else a step would be as long as both may be."""
    deployment, pace = Deployment(), Pace(stretch=1.0)
    loop = deployment.loop(pace=pace)
    pace.observe(1, 0, 0.001)
    loop.add(deployment.request(0, random.Random(0), adapter=None, max_tokens=6), lambda event: None)
    loop.step()
    told: list[float] = []

    def prompt_tokens(num_decodes: int, spent: float) -> int:
        told.append(spent)
        return 1

    monkeypatch.setattr(pace, "prompt_tokens", prompt_tokens)
    monkeypatch.setattr(loop, "_encode_images", lambda: time.sleep(0.02))
    loop.step()
    assert len(told) == 1
    assert told[0] >= 0.02


@pytest.mark.parametrize("stops", [False, True], ids=["leaves", "ends"])
def test_who_ends_while_a_token_is_unread_leaves_nothing(stops: bool):
    """The next step may be an hour from now; that hour is no step's time."""
    deployment, pace = Deployment(), Pace()
    loop = deployment.loop(overlap=True, pace=pace)
    request = deployment.request(0, random.Random(0), adapter=None, max_tokens=50)
    tokens = deployment.alone(request)
    if stops:  # at its third token, when the fourth is computed
        request = replace(request, stop=(chr(tokens[2]),))
    loop.add(request, lambda event: None)
    for _ in range(3):
        loop.step()
    if stops:
        while loop.has_work:
            loop.step()
    else:
        loop.abort("0")
    loop.check_integrity()
    assert loop.stats().kv_blocks_used == 0
    request = replace(request, stop=())
    pace.observe = lambda *step: pytest.fail("a step that nobody waited for")  # type: ignore[method-assign]
    again: list = []
    loop.add(replace(request, max_tokens=1), again.append)
    loop.step()
    del pace.observe
    while loop.has_work:
        loop.step()
    assert tokens_of(again) == without_eos(deployment.alone(request))[:1]


class Lost(RuntimeError):
    """What a GPU says whose context is gone."""


def lose(device: torch.device) -> None:
    raise Lost


def break_down(monkeypatch: pytest.MonkeyPatch, loop: StepLoop, encoder: ToyEncoder, place: str) -> None:
    """Whatever is done there fails from now on."""
    match place:
        case "step":
            monkeypatch.setattr(loop.runner, "run", lambda *step: 1 / 0)
        case "read":
            monkeypatch.setattr(Choice, "read", lambda choice: 1 / 0)
        case "encoding":
            monkeypatch.setattr(encoder, "by_layers", lambda features, pixels: 1 / 0)


@pytest.mark.parametrize("place", ["step", "read", "encoding"])
def test_a_lost_device_ends_the_loop_and_everybody_is_told(monkeypatch: pytest.MonkeyPatch, place: str):
    """Else every request fails from then on, on a worker that seems to be well."""
    deployment = Deployment()
    loop = deployment.loop(overlap=True)
    events: dict[str, list] = {id: [] for id in "012"}
    going_on = {"sampling": SamplingParams(temperature=0, ignore_eos=True), "max_tokens": 9, "adapter": None}
    for i in range(2):
        loop.add(deployment.request(i, random.Random(i), **going_on), events[str(i)].append)
    loop.step()
    sees, image = deployment.adapters[-1], ImageInput("x", torch.ones(3, 4, 4))
    loop.add(deployment.request(2, random.Random(2), adapter=sees, image=image), events["2"].append)
    break_down(monkeypatch, loop, deployment.encoder, place)
    monkeypatch.setattr("server.worker.step_loop.check_device", lose)
    with pytest.raises(Lost):
        loop.step()
    loop.fail_all(503, "gone")
    assert [[e.status for e in own if isinstance(e, Failed)] for own in events.values()] == [[503]] * 3
    assert not loop.has_work


def test_everybody_is_told_of_the_end_though_tokens_cannot_be_read(monkeypatch: pytest.MonkeyPatch):
    """The device may be lost when the worker is told to stop."""
    deployment, events = Deployment(), []  # type: ignore[var-annotated]
    loop = deployment.loop(overlap=True)
    loop.add(deployment.request(0, random.Random(0), adapter=None, max_tokens=9), events.append)
    loop.step()
    break_down(monkeypatch, loop, deployment.encoder, "read")
    monkeypatch.setattr("server.worker.step_loop.check_device", lose)
    loop.fail_all(503, "gone")
    assert events[-1].status == 503


@pytest.mark.parametrize("place", ["step", "read", "encoding"])
def test_after_a_failure_the_device_is_asked_once(monkeypatch: pytest.MonkeyPatch, place: str):
    deployment, asked = Deployment(), []  # type: ignore[var-annotated]
    loop = deployment.loop(overlap=True)
    monkeypatch.setattr("server.worker.step_loop.check_device", asked.append)
    sees, image = deployment.adapters[-1], ImageInput("x", torch.ones(3, 4, 4))
    request = deployment.request(0, random.Random(0), adapter=sees, image=image, max_tokens=4)
    assert isinstance(run(loop, [request])["0"][-1], Finished)
    assert asked == []
    other = replace(request, image=ImageInput("y", torch.zeros(3, 4, 4)))
    with monkeypatch.context() as broken:
        break_down(broken, loop, deployment.encoder, place)
        assert run(loop, [other])["0"][-1].status == 500
    assert asked == [deployment.base.device]
    assert isinstance(run(loop, [request])["0"][-1], Finished)


@pytest.mark.parametrize("sees", [False, True])
def test_a_request_that_cannot_be_set_up_leaves_nothing(monkeypatch: pytest.MonkeyPatch, sees: bool):
    """Nor does it end the loop at its next step, with all who run."""
    deployment = Deployment()
    loop = deployment.loop()
    adapter, image = None, None
    if sees:
        adapter, image = deployment.adapters[-1], ImageInput("x", torch.ones(3, 4, 4))
    request = deployment.request(0, random.Random(0), adapter=adapter, image=image)
    with monkeypatch.context() as broken:
        broken.setattr("server.worker.step_loop.OutputStream", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loop.add(request, lambda event: None)
    loop.check_integrity()
    loop.step()
    assert loop.stats().waiting == loop.stats().running == 0
    assert tokens_of(run(loop, [request])["0"]) == without_eos(deployment.alone(request))


def test_a_failing_encoder_fails_its_own_requests_and_leaves_no_stale_prompts(
    caplog: pytest.LogCaptureFixture,
):
    deployment = Deployment()
    loop = deployment.loop()
    sees = deployment.adapters[-1]
    image = ImageInput("y", torch.ones(3, 4, 4))
    request = deployment.request(0, random.Random(0), adapter=sees, image=image)
    good = deployment.encoder.by_layers
    deployment.encoder.by_layers = lambda features, pixels: 1 / 0  # type: ignore[method-assign]
    other = deployment.request(1, random.Random(1), adapter=None, image=None)
    events = run(loop, [request, other])
    assert isinstance(events["0"][-1], Failed)
    assert tokens_of(events["1"]) == without_eos(deployment.alone(other))
    deployment.encoder.by_layers = good  # type: ignore[method-assign]
    events = run(loop, [request])
    assert tokens_of(events["0"]) == without_eos(deployment.alone(request))
    assert "images of 1 requests were not encoded" in caplog.text


def test_weights_that_are_not_finite_end_their_own_request_only():
    deployment = Deployment()
    bad = deployment.adapters[1]
    assert bad is not None
    with torch.no_grad():
        bad.adapter.gate.fill_(float("nan"))
    loop = deployment.loop()
    requests = [
        deployment.request(0, random.Random(0), adapter=bad, image=None),
        deployment.request(1, random.Random(1), adapter=None, image=None),
    ]
    scoring = SamplingParams(prompt_logprobs=1)
    for i, max_tokens in ((2, 0), (3, 4)):
        asked = replace(requests[0], request_id=str(i), sampling=scoring, max_tokens=max_tokens)
        requests.append(asked)
    events = run(loop, requests)
    for i in ("0", "2", "3"):
        assert isinstance(events[i][-1], Failed)
        assert scores_of(events[i]) == []
    assert isinstance(events["1"][-1], Finished)
    assert tokens_of(events["1"]) == without_eos(deployment.alone(requests[1]))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("budget", [64, 7])
def test_prompt_logprobs_are_those_of_the_plain_pass(budget: int, overlap: bool):
    deployment = Deployment()
    loop = deployment.loop(budget=budget, seqs=4, overlap=overlap)
    params = SamplingParams(temperature=0, prompt_logprobs=2, logprobs=3)
    requests = [deployment.request(i, random.Random(i), sampling=params) for i in range(3)]
    requests.append(replace(requests[0], request_id="scored only", max_tokens=0))
    events = run(loop, requests)
    for request in requests:
        logprobs = deployment.logits(request, request.token_ids).log_softmax(-1)
        pieces = scores_of(events[request.request_id])
        assert max(len(piece.logprobs) for piece in pieces) <= budget + 1  # the first token needs no row
        assert [piece.more for piece in pieces] == [True] * (len(pieces) - 1) + [False]
        scored = join_scores(pieces)
        assert [item.token_id for item in scored.logprobs] == request.token_ids
        assert scored.text == Bytes().decode(request.token_ids)
        assert scored.logprobs[0].logprob is None
        for position, item in enumerate(scored.logprobs[1:]):
            assert item.logprob == pytest.approx(logprobs[position, item.token_id].item(), abs=1e-5)
            best = logprobs[position].topk(2).indices.tolist()
            assert [top.token_id for top in item.top] == best
        deltas = [e for e in events[request.request_id] if isinstance(e, Delta)]
        first = [item for delta in deltas for item in delta.logprobs][:1]
        if first:
            assert first[0].logprob == pytest.approx(logprobs[-1].max().item(), abs=1e-5)
            assert len(first[0].top) == 3


def test_a_prompt_that_is_preempted_halfway_is_scored_once():
    """Computed again from its beginning, it tells the rest of its scores alone."""
    deployment = Deployment()
    loop = deployment.loop(num_blocks=8, budget=6, seqs=2)
    tokens = random.Random(0).choices(range(2, 97), k=28)
    plain = deployment.request(0, random.Random(0), adapter=None)
    grows = replace(
        plain,
        token_ids=tokens[:4],
        max_tokens=12,
        sampling=SamplingParams(temperature=0, ignore_eos=True),
    )
    scores = SamplingParams(temperature=0, prompt_logprobs=1)
    scored = replace(plain, request_id="1", token_ids=tokens[4:], max_tokens=0, sampling=scores)
    events = run(loop, [grows, scored])
    assert loop.stats().preemptions == 1
    assert len(scores_of(events["1"])) > 2
    told = join_scores(scores_of(events["1"])).logprobs
    assert [item.token_id for item in told] == scored.token_ids
    logprobs = deployment.logits(scored, scored.token_ids).log_softmax(-1)
    wanted = [logprobs[i, token].item() for i, token in enumerate(scored.token_ids[1:])]
    assert [item.logprob for item in told[1:]] == pytest.approx(wanted, abs=1e-5)


def test_bfloat16_batches_stay_near_the_plain_pass():
    """bfloat16 has 8 bits of mantissa; four layers of it part by less than 2 % of the logits' range."""
    deployment = Deployment("gqa", torch.bfloat16)
    loop = deployment.loop(budget=9, seqs=8)
    params = SamplingParams(temperature=0, prompt_logprobs=0)
    rng = random.Random(4)
    requests = [deployment.request(i, rng, sampling=params, max_tokens=0) for i in range(12)]
    events = run(loop, requests)
    for request in requests:
        logits = deployment.logits(request, request.token_ids)
        scored = join_scores(scores_of(events[request.request_id]))
        for position, item in enumerate(scored.logprobs[1:]):
            expected = logits[position].log_softmax(-1)[item.token_id].item()
            assert item.logprob == pytest.approx(expected, abs=0.02 * float(logits.max() - logits.min()))


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_packed_weights_give_the_same_tokens(name: str):
    deployment = Deployment(name)
    rng = random.Random(name)
    requests = [deployment.request(i, rng) for i in range(12)]
    alone = [without_eos(deployment.alone(request)) for request in requests]
    deployment.base.pack()
    events = run(deployment.loop(), requests)
    assert [tokens_of(events[request.request_id]) for request in requests] == alone

"""Worker and training give the same with the Triton kernels as without, and choose them where they can."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import CONFIGS, random_adapter, random_base
from tiny_base import write_tiny_base

from models.adapter import base_spec
from models.adapter_config import (
    AdapterConfig,
    LoraConfig,
    PromptConfig,
    ScaleBiasConfig,
    VisionConfig,
)
from models.config import ModelConfig
from models.kernels import choice
from models.kernels.choice import use_triton
from models.kernels.decode_graph import DecodeGraphs
from server.serving import StartupError
from server.settings import WorkerSettings
from server.worker.build import build_engine
from server.worker.runner import Kernels, Runner, StepItem
from server.worker.sight import LoadedAdapter
from train import build as train_build
from train.attention import PackedAttend
from train.data.batches import Pass
from train.errors import TrainError
from train.forward import Forward
from train.recipe import ComputeRecipe
from train.triton_attention import TritonPackedAttend

EVERY = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def adapter_configs(config: ModelConfig) -> list[AdapterConfig]:
    """Prompts alone; all that scales, adds and norms; scales of inputs beside low-rank terms."""
    spec = base_spec(config)
    return [
        AdapterConfig(base=spec, prompt=PromptConfig(length=5, layers=(2, 3))),
        AdapterConfig(
            base=spec,
            prompt=PromptConfig(length=10, layers=(1, 2, 3)),
            norms=True,
            final_norm=True,
            head=True,
            scale_bias=ScaleBiasConfig(scale="output", scale_targets=EVERY, bias_targets=EVERY),
        ),
        AdapterConfig(
            base=spec,
            scale_bias=ScaleBiasConfig(scale="input", scale_targets=EVERY, bias_targets=("wq", "w2")),
            lora=LoraConfig(rank=3, targets=("wq", "wo")),
        ),
    ]


@torch.no_grad()
def steps(
    config: ModelConfig, kernels: Kernels, device: str, max_decodes: int = 0, known: bool = False
) -> list[torch.Tensor]:
    """Logits of eight steps: chunks that mix adapters, chunks beside decodes, and decodes alone; the last two
    have tokens of the step before, unless they are to be `known`."""
    base = random_base(config).to(device)
    adapters = [
        LoadedAdapter((f"a{i}", 1), random_adapter(adapter_config, seed=i).to(device))
        for i, adapter_config in enumerate(adapter_configs(config))
    ]
    runner = Runner(
        base,
        num_blocks=32,
        block_size=4,
        max_hot_adapters=4,
        prompt_slots=4,
        kernels=kernels,
        max_decodes=max_decodes,
        max_model_len=32,
    )

    def item(sequence: int, start: int, num_tokens: int) -> StepItem:
        tokens = [
            (7 * sequence + 3 * position) % config.vocab_size for position in range(start, start + num_tokens)
        ]
        blocks = range(sequence * 8, sequence * 8 + 8)
        return StepItem(tokens, start, blocks, [*adapters, None][sequence], None, slice(-1, None))

    def unread(items: list[StepItem]) -> tuple[list[StepItem], torch.Tensor | None]:
        """The decodes' tokens where only the device knows them: in the step before, in another order."""
        if known:
            return items, None
        decodes = [item for item in items if len(item.tokens) == 1]
        last = torch.tensor([item.tokens[0] for item in reversed(decodes)], device=device)
        told = [replace(item, tokens=[m - len(decodes)]) for m, item in enumerate(decodes)]
        return told + items[len(decodes) :], last

    return [
        runner.run([item(0, 0, 7), item(1, 0, 3), item(3, 0, 2)]),
        runner.run([item(0, 7, 1), item(3, 2, 1), item(1, 3, 9), item(2, 0, 5)]),
        runner.run([item(0, 8, 1), item(1, 12, 1), item(2, 5, 1), item(3, 3, 1)]),
        runner.run([item(0, 9, 1), item(1, 13, 1), item(3, 4, 1)]).clone(),
        runner.run([item(0, 10, 1), item(3, 5, 1)]).clone(),
        runner.run([item(3, 6, 1)]).clone(),
        runner.run(*unread([item(0, 11, 1), item(3, 7, 1)])).clone(),
        runner.run(*unread([item(0, 12, 1), item(3, 8, 1), item(1, 14, 3)])),
    ]


@pytest.mark.long
def test_a_worker_computes_the_same(device: str):
    plain = steps(CONFIGS["gqa"], "none", device, known=True)
    others = [steps(CONFIGS["gqa"], kernels, device) for kernels in ("none", "cpu", "triton")]
    others.append(steps(CONFIGS["gqa"], "triton", device, max_decodes=8))
    for other in others:
        torch.testing.assert_close(other, plain, atol=2e-4, rtol=2e-4)


def test_a_training_pass_computes_the_same(device: str):
    """Loss and every parameter's gradient, through the whole model."""
    config, lens = CONFIGS["gqa"], (9, 1, 6)
    tokens = torch.arange(sum(lens)) % config.vocab_size
    positions = torch.cat([torch.arange(n) for n in lens])
    targets = (positions >= 2).nonzero()[:, 0]
    batch = Pass(tokens, positions, lens, targets - 1, tokens[targets], None, (-1,) * len(lens)).to(device)
    results = []
    for triton in (True, False):
        base = random_base(config).to(device)
        adapter = random_adapter(adapter_configs(config)[1]).to(device)
        forward = Forward(base, adapter, None, live=False, checkpointing=False, triton=triton)
        results.append((forward.backward(batch, 1.0), [p.grad for p in adapter.parameters()]))
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sees", [True, False])
def test_slots_of_images_compute_the_same(sees: bool, device: str):
    """Layers with other numbers of rows each, and a layer without any."""
    torch.manual_seed(0)
    config, lens = CONFIGS["gqa"], (5, 1, 9)
    vision = VisionConfig(
        encoder="efficientnet-lite0",
        features="global",
        projector="linear",
        fusion="early",
        layers=(0,),
        num_tokens=5,
        feature_dim=7,
        hidden_size=7,
    )
    adapter_config = AdapterConfig(
        base=base_spec(config), prompt=PromptConfig(length=3, layers=(2, 3)), vision=vision
    )
    base, adapter = random_base(config).to(device), random_adapter(adapter_config).to(device)
    prompts = adapter.prompts(base, adapter.see(torch.randn(3, 7, device=device)) if sees else None)
    slots_B = torch.tensor([2, 0, 2], device=device) if sees else None
    q = torch.randn(sum(lens), config.num_heads, config.head_dim, device=device)
    k, v = torch.randn(2, sum(lens), config.num_kv_heads, config.head_dim, device=device).unbind()
    ours, theirs = (
        make(lens, prompts, slots_B, torch.device(device)) for make in (TritonPackedAttend, PackedAttend)
    )
    for layer in range(config.num_layers):
        torch.testing.assert_close(ours(layer, q, k, v), theirs(layer, q, k, v), atol=1e-4, rtol=1e-4)
    bare, plain = (
        make(lens, None, None, torch.device(device)) for make in (TritonPackedAttend, PackedAttend)
    )
    torch.testing.assert_close(bare(0, q, k, v), plain(0, q, k, v), atol=1e-4, rtol=1e-4)


def test_graphs_are_recorded_once_adapters_have_their_places(monkeypatch: pytest.MonkeyPatch, device: str):
    """Recorded before, none would be used: prompts lie elsewhere once there are longer ones."""
    config, seen = CONFIGS["gqa"], []
    monkeypatch.setattr(
        DecodeGraphs,
        "record_all",
        lambda graphs, slots: seen.append((graphs._prompts.k_LSKGD.shape[2], slots)),
    )
    base = random_base(config).to(device)
    sizes = {"num_blocks": 8, "block_size": 4, "max_hot_adapters": 4, "prompt_slots": 4, "max_model_len": 16}
    runner = Runner(base, **sizes, kernels="triton", max_decodes=2)
    adapters = [random_adapter(adapter_config).to(device) for adapter_config in adapter_configs(config)]
    runner.warm([LoadedAdapter((f"a{i}", 1), adapter) for i, adapter in enumerate(adapters)])
    assert seen == [(10, [1, 2, 3])]


def test_a_gpu_takes_the_kernels_and_a_cpu_does_not(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(choice, "_can_build", lambda: True)
    assert use_triton("auto", CUDA, torch.bfloat16, 128)
    assert not use_triton("auto", CPU, torch.bfloat16, 128)
    assert not use_triton("torch", CUDA, torch.bfloat16, 128)


def test_auto_says_why_it_does_without(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.WARNING)
    monkeypatch.delenv("CC", raising=False)
    with monkeypatch.context() as without:
        without.setattr(choice.shutil, "which", lambda name: None)
        assert not use_triton("auto", CUDA, torch.bfloat16, 128)
    monkeypatch.setattr(choice, "_can_build", lambda: True)
    with monkeypatch.context() as turing:
        turing.setattr(torch.cuda, "is_available", lambda: True)
        turing.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert not use_triton("auto", CUDA, torch.bfloat16, 128)
    assert not use_triton("auto", CUDA, torch.float64, 128)
    assert not use_triton("auto", CUDA, torch.bfloat16, 512)
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: None)
    assert not use_triton("auto", CUDA, torch.bfloat16, 128)
    for said in (
        "gcc",
        "wants compute capability 8.0, and the GPU has 7.5",
        "torch.float64",
        "512",
        "llama-adapter-server[gpu]",
    ):
        assert said in caplog.text


def test_a_worker_that_must_have_them_does_not_start_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    write_tiny_base(tmp_path / "tiny")
    settings = WorkerSettings(
        base=str(tmp_path / "tiny"), dtype="float32", kv_cache_mib=1, attention="triton"
    )
    with pytest.raises(StartupError, match=r"attention 'triton' cannot be used: the device is 'cpu'"):
        build_engine(settings)


def test_a_training_that_must_have_them_does_not_start_without(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    base = random_base(CONFIGS["gqa"])
    assert not train_build._use_triton(ComputeRecipe(), base)
    with pytest.raises(TrainError, match=r"compute\.attention 'triton' cannot be used: the device is 'cpu'"):
        train_build._use_triton(ComputeRecipe(attention="triton"), base)

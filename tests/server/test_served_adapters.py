"""Adapters of every format, side by side in one real service, against references that share no code.

The base is the one that LitGPT's fixtures were made on; its tokenizer has a letter per token, so that the
text of an answer tells its token ids. What is compared are the log-probabilities of prompt and answer, as
anybody can ask for them over the API, and that each answered token was the reference's likeliest.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from adapter_files import K, Sample, chat_65b, reference_7b, reference_v1, save_sample
from base_files import to_interleaved
from litgpt_files import CONFIG, FIXTURES, base_weights, litgpt_oracle, weights_file
from numpy.typing import NDArray
from oracle import Oracle
from PIL import Image
from safetensors.torch import load_file
from service import Service, serving
from support import random_adapter, transformers_twin
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from models.adapter import base_spec
from models.adapter_config import LINEARS, AdapterConfig
from models.checkpoints.huggingface import write_huggingface
from models.checkpoints.native import save_adapter
from models.llama import Llama
from models.vision.encoder import VisionEncoder, load_encoder

pytestmark = [
    pytest.mark.server,
    # PEFT still asks transformers by a name that transformers is about to drop.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

Logits = Callable[[list[int]], NDArray[np.float64]]
LETTERS = "abcdefghijklmnopqrstuvwxyz?!."
PROMPTS = ([3, 1, 4, 1, 5, 9, 2, 6], [0], [27, 18, 28, 18, 28])
ANSWER = 12
ENCODER = "efficientnet-lite0"
CAPTION = "cap_adapter_query.weight"
RELEASED = "llama_adapter_len10_layer30_release.pth"


@dataclass
class Served:
    """What comes after `--adapter`, and what the answers must equal."""

    argument: str
    logits: Logits  # token ids → [T, V]


def write_base(folder: Path) -> None:
    folder.mkdir()
    write_huggingface(folder, CONFIG, base_weights().items())
    backend = Tokenizer(models.BPE(vocab={letter: id for id, letter in enumerate(LETTERS)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))


def of_reference(sample: Sample, features: NDArray[np.float64] | None = None) -> Logits:
    """Of a file of the reference code, in whose row order the oracle's base is too."""
    base = {name: to_interleaved(name, weight, CONFIG) for name, weight in base_weights().items()}
    base, own = ({k: t.double().numpy() for k, t in weights.items()} for weights in (base, sample.own))
    oracle = Oracle(CONFIG, base, sample.config, own, rope="interleaved")
    return lambda tokens: oracle.logits(tokens, features)


def text_files(folder: Path) -> dict[str, Served]:
    """The reference code's files without images."""
    tanh, raw = reference_v1(CONFIG), reference_v1(CONFIG, activation="raw")
    files = {
        "v1": (tanh, "self-trained.pth", f",length={K}"),
        "v1-raw": (raw, "other.pth", f",length={K},gate=raw,template=plain"),
        "v1-released": (raw, RELEASED, f",length={K}"),
        "v1-caption": (reference_v1(CONFIG, CAPTION), "caption.pth", f",length={K}"),
        "chat-65b": (chat_65b(CONFIG), "chat.pth", ""),
        "chat-65b-no-norm": (chat_65b(CONFIG, final_norm=False), "no-norm.pth", ""),
    }
    served = {
        id: Served(f"{save_sample(sample, folder / name)}{options}", of_reference(sample))
        for id, (sample, name, options) in files.items()
    }
    full = {"model": tanh.tensors, "optimizer": {}, "args": argparse.Namespace(adapter_len=K)}
    torch.save(full, folder / "checkpoint-4.pth")
    return served | {"v1-training": Served(str(folder / "checkpoint-4.pth"), of_reference(tanh))}


def sighted_samples(encoder: str, width: int) -> dict[str, Sample]:
    return {
        "bias-7b": reference_7b(CONFIG, encoder=encoder, F=width),
        "lora-bias-7b": reference_7b(CONFIG, lora=2, encoder=encoder, F=width),
        "caption-7b": reference_7b(CONFIG, bias=False, encoder=encoder, F=width),
    }


def sighted_files(folder: Path, encoder: str) -> dict[str, Served]:
    """The 7B formats, which condition a request without an image on an all-zero one."""
    eye = load_encoder(encoder)
    nothing = features_of(eye, torch.zeros(3, eye.image_size, eye.image_size))
    return {
        id: Served(
            f"{save_sample(sample, folder / f'{id}.pth')},encoder={encoder}", of_reference(sample, nothing)
        )
        for id, sample in sighted_samples(encoder, eye.token_dim).items()
    }


def features_of(eye: VisionEncoder, pixels_CHW: Tensor) -> NDArray[np.float64]:
    return eye.tokens(pixels_CHW[None])[0].double().numpy()


def litgpt_files() -> dict[str, Served]:
    served = {}
    for kind in ("adapter", "adapter_v2"):
        for version in ("0.5.4", "0.5.13"):
            options = f",litgpt={version}" if kind == "adapter" else ""
            path = f"{weights_file(kind, version).parent}{options}"
            served[f"litgpt-{kind}-{version}"] = Served(path, litgpt_oracle(kind, version).logits)
    return served


def peft_folder(folder: Path) -> dict[str, Served]:
    """Saved by PEFT, whose own model is the reference."""
    from peft import AdaptionPromptConfig, get_peft_model

    twin = transformers_twin(Llama(CONFIG).load(base_weights().items()))
    model = get_peft_model(twin, AdaptionPromptConfig(adapter_len=3, adapter_layers=2, task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adaption_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder / "peft")

    @torch.no_grad()
    def logits(tokens: list[int]) -> NDArray[np.float64]:
        return model.eval()(torch.tensor([tokens])).logits[0].double().numpy()

    return {"peft": Served(str(folder / "peft"), logits)}


def native_folder(folder: Path) -> dict[str, Served]:
    """V2 as the paper has it, with LoRA beside."""
    config = AdapterConfig.model_validate(
        {
            "base": base_spec(CONFIG).model_dump(),
            "prompt": {"length": 4, "layers": (0, 2)},
            "gate": {"per": "layer", "new_gate": True},
            "norms": True,
            "scale_bias": {"scale": "output", "scale_targets": LINEARS, "bias_targets": LINEARS},
            "lora": {"rank": 3, "alpha": 6, "targets": ("wk", "wv", "w2"), "on_prompts": True},
        }
    )
    adapter = random_adapter(config, seed=5)
    save_adapter(adapter, folder / "native")
    own = {name: tensor.double().numpy() for name, tensor in adapter.state_dict().items()}
    oracle = Oracle(CONFIG, {k: t.double().numpy() for k, t in base_weights().items()}, config, own)
    return {"native": Served(str(folder / "native"), oracle.logits)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    write_base(folder / "base")
    return folder


@pytest.fixture(scope="module")
def adapters(folder: Path) -> dict[str, Served]:
    return (
        text_files(folder)
        | sighted_files(folder, ENCODER)
        | litgpt_files()
        | peft_folder(folder)
        | native_folder(folder)
    )


def serve(folder: Path, adapters: dict[str, Served]) -> AbstractContextManager[Service]:
    flags = [piece for id, one in adapters.items() for piece in ("--adapter", f"{id}={one.argument}")]
    return serving("--base", str(folder / "base"), "--dtype", "float32", "--experts", "", *flags)


@pytest.fixture(scope="module")
def service(folder: Path, adapters: dict[str, Served]) -> Iterator[Service]:
    with serve(folder, adapters) as service:
        yield service


def complete(service: Service, model: str, prompts: list[list[int]]) -> list[dict]:
    body = {
        "model": model,
        "prompt": prompts,
        "max_tokens": ANSWER,
        "temperature": 0,
        "ignore_eos": True,
        "echo": True,
        "logprobs": 1,
    }
    response = httpx.post(f"{service.url}/v1/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()["choices"]


def check(choice: dict, prompt: list[int], logits: Logits) -> None:
    """Prompt and answer are scored as the reference scores them."""
    ids = [LETTERS.index(token) for token in choice["logprobs"]["tokens"]]
    assert choice["text"] == "".join(choice["logprobs"]["tokens"])
    assert ids[: len(prompt)] == prompt
    assert choice["logprobs"]["token_logprobs"][0] is None
    check_scores(ids, len(prompt), choice["logprobs"]["token_logprobs"][1:], logits)


def check_scores(ids: list[int], prompt: int, logprobs: list[float], logits: Logits) -> None:
    """The last log-probabilities are the reference's; each token after the prompt is its likeliest."""
    assert len(ids) == prompt + ANSWER
    logits_TV = logits(ids)
    logprobs_TV = logits_TV - np.log(np.exp(logits_TV).sum(axis=-1, keepdims=True))
    assert ids[prompt:] == list(logprobs_TV[prompt - 1 : -1].argmax(-1))
    expected = [logprobs_TV[t, id] for t, id in enumerate(ids[1:])]
    np.testing.assert_allclose(logprobs, expected[-len(logprobs) :], atol=1e-3, rtol=0)


def check_picture(service: Service, id: str, encoder: str) -> None:
    """A chat about a picture, whose colours the 7B files take as blue, green, red."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    text = {"type": "text", "text": "what is it?"}
    image = {"type": "image_url", "image_url": {"url": url}}
    asked = {"model": id, "messages": [{"role": "user", "content": [text]}]}
    prompt = httpx.post(f"{service.url}/tokenize", json=asked).json()["tokens"]
    assert "whatisit?" in "".join(LETTERS[token] for token in prompt)  # there is no token for a space
    asked["messages"] = [{"role": "user", "content": [image, text]}]
    wanted = {"max_tokens": ANSWER, "temperature": 0, "ignore_eos": True, "logprobs": True}
    response = httpx.post(f"{service.url}/v1/chat/completions", json=asked | wanted, timeout=60)
    scored = response.json()["choices"][0]["logprobs"]["content"]
    ids = prompt + [LETTERS.index(one["token"]) for one in scored]
    eye = load_encoder(encoder)
    logits = of_reference(
        sighted_samples(encoder, eye.token_dim)[id], features_of(eye, eye.preprocess(picture, "bgr"))
    )
    check_scores(ids, len(prompt), [one["logprob"] for one in scored], logits)


def steps(service: Service) -> float:
    lines = httpx.get(f"{service.url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("llama_adapter:engine_steps"))


def test_all_formats_in_one_batch(service: Service, adapters: dict[str, Served]) -> None:
    fewest = math.inf
    for _ in range(5):  # on a busy machine requests may arrive one after another
        before = steps(service)
        with ThreadPoolExecutor(len(adapters)) as pool:
            answers = dict(
                zip(
                    adapters, pool.map(lambda id: complete(service, id, list(PROMPTS)), adapters), strict=True
                )
            )
        for id, choices in answers.items():
            for prompt, choice in zip(PROMPTS, choices, strict=True):
                check(choice, prompt, adapters[id].logits)
        fewest = min(fewest, steps(service) - before)
        if 0 < fewest < len(adapters) * ANSWER / 2:  # each adapter by itself takes twice that
            break
    assert 0 < fewest < len(adapters) * ANSWER / 2
    texts = {id: choices[0]["text"] for id, choices in answers.items()}
    assert texts.pop("v1-raw") == texts.pop("v1-released")
    assert texts["v1"] == texts.pop("v1-training") == texts.pop("v1-caption")  # one and the same weights
    assert len(set(texts.values())) == len(texts)


def test_the_base_beside_its_adapters(service: Service) -> None:
    oracle = Oracle(CONFIG, {name: weight.double().numpy() for name, weight in base_weights().items()})
    for prompt in PROMPTS:
        check(complete(service, "base", [prompt])[0], prompt, oracle.logits)


@pytest.mark.parametrize("version", ["0.5.4", "0.5.13"])
@pytest.mark.parametrize("kind", ["adapter", "adapter_v2"])
def test_litgpt_s_own_numbers(service: Service, kind: str, version: str) -> None:
    """No oracle between: the logits that LitGPT computed, asked for over the API."""
    expected = load_file(FIXTURES / f"{kind}-{version}" / "expected.safetensors")
    tokens = expected["tokens"].tolist()
    answer = complete(service, f"litgpt-{kind}-{version}", [tokens])[0]["logprobs"]
    logprobs_TV = expected["logits"].double().log_softmax(-1).numpy()
    theirs = [logprobs_TV[t, id] for t, id in enumerate(tokens[1:])]
    np.testing.assert_allclose(answer["token_logprobs"][1 : len(tokens)], theirs, atol=1e-3, rtol=0)
    assert LETTERS.index(answer["tokens"][len(tokens)]) == int(logprobs_TV[-1].argmax())


@pytest.mark.parametrize("id", ["bias-7b", "lora-bias-7b", "caption-7b"])
def test_pictures(service: Service, id: str) -> None:
    check_picture(service, id, ENCODER)


@pytest.mark.clip
@pytest.mark.skipif(not find_spec("open_clip"), reason="the clip extra is not installed")
def test_7b_files_on_a_local_clip(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their own kind of encoder, from a checkpoint of open_clip's that holds random weights."""
    import open_clip

    torch.manual_seed(0)
    torch.save(open_clip.create_model("ViT-S-32").state_dict(), tmp_path / "weights.pt")
    encoder = f"open_clip:ViT-S-32:{tmp_path / 'weights.pt'}"
    adapters = sighted_files(tmp_path, encoder)
    (tmp_path / "sitecustomize.py").write_text("import torchvision_cpu\n")  # for the worker's process
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{Path(__file__).parents[1]}")
    with serve(folder, adapters) as service:
        for id, one in adapters.items():
            check(complete(service, id, [PROMPTS[0]])[0], PROMPTS[0], one.logits)
            check_picture(service, id, encoder)


def test_what_is_served_is_told(service: Service, adapters: dict[str, Served]) -> None:
    models = {model["id"]: model for model in httpx.get(f"{service.url}/v1/models").json()["data"]}
    assert models.keys() == {"base", *adapters}
    assert models["lora-bias-7b"]["reads_images"] is True
    assert models["chat-65b"]["variant"] == "V2 text"
    json.dumps(models)

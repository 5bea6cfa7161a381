"""BLIP's way from a folder to a caption, with a tiny random model: what it says means nothing."""

import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image

from experts.blip import BlipExpert
from experts.contract import ExpertError

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *"abcdefghijklmnopqrstuvwxyz"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration

    path = tmp_path_factory.mktemp("blip")
    (path / "vocab.txt").write_text("\n".join(VOCABULARY))
    BertTokenizer(str(path / "vocab.txt"), additional_special_tokens=["[DEC]"]).save_pretrained(path)
    tiny = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": 5, "pad_token_id": 0, "sep_token_id": 3, "eos_token_id": 3}
    config = BlipConfig(
        text_config={**tiny, **ids, "vocab_size": len(VOCABULARY), "encoder_hidden_size": 16},
        vision_config={**tiny, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    torch.manual_seed(0)
    BlipForConditionalGeneration(config).save_pretrained(path)
    return path


async def test_it_captions(folder: Path, photo: Callable[[str], bytes]) -> None:
    from transformers import BlipForConditionalGeneration, BlipImageProcessorPil

    expert = BlipExpert(folder)
    await expert.load()
    try:
        reading = await expert.read(photo("coffee.png"))
    finally:
        await expert.close()
    # The same weights and transformers' own image processor, step by step, by argmax.
    model = BlipForConditionalGeneration.from_pretrained(folder).eval()
    processor = BlipImageProcessorPil(size={"height": 32, "width": 32})
    with Image.open(BytesIO(photo("coffee.png"))) as image:
        pixels = processor(image.convert("RGB"), return_tensors="pt").pixel_values
    seen = model.vision_model(pixels).last_hidden_state
    ids = torch.tensor([[5]])
    for _ in range(40):
        logits = model.text_decoder(input_ids=ids, encoder_hidden_states=seen).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        if ids[0, -1] == 3:
            break
    words = [VOCABULARY[i] for i in ids[0, 1:] if i > 5]
    assert words
    assert reading.text.split() == words
    assert (expert.name, expert.version[:5]) == ("caption", "blip-")


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExpertError, match=r"holds no BLIP weights \(\*\.safetensors or \*\.bin\)"):
        BlipExpert(tmp_path)


async def test_broken_weights_are_an_error_that_names_the_folder(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    expert = BlipExpert(tmp_path)
    assert expert.version != BlipExpert(folder).version
    with pytest.raises(ExpertError, match=f"{tmp_path}: not a usable BLIP model"):
        await expert.load()
    await expert.close()

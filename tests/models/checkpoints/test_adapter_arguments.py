"""`id=PATH[,option=value …]`, as the command line gives it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.checkpoints.adapters import AdapterOptions, parse_adapter_argument, parse_options
from models.errors import CheckpointError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("poet=./poet", ("poet", "poet", AdapterOptions())),
        ("a:b.c-1=/x/y=z.pth", ("a:b.c-1", "/x/y=z.pth", AdapterOptions())),
        ("a=x,gate=raw", ("a", "x", AdapterOptions(gate="raw"))),
        (
            "a=x,gate=tanh,template=vicuna_v1,color=bgr,litgpt=0.5.13,length=12,encoder=efficientnet-lite0",
            ("a", "x", AdapterOptions("tanh", "vicuna_v1", "bgr", "0.5.13", 12, "efficientnet-lite0")),
        ),
        (
            "a=x,encoder=open_clip:ViT-L-14-quickgelu:/models/ViT-L-14.pt",
            ("a", "x", AdapterOptions(encoder="open_clip:ViT-L-14-quickgelu:/models/ViT-L-14.pt")),
        ),
        ("a=x y,length=1024", ("a", "x y", AdapterOptions(length=1024))),
    ],
)
def test_what_is_said_is_understood(text: str, expected: tuple[str, str, AdapterOptions]):
    id, path, options = expected
    assert parse_adapter_argument(text) == (id, Path(path), options)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "write it as id=PATH"),
        ("poet", "write it as id=PATH"),
        ("poet=", "write it as id=PATH"),
        ("poet=,gate=raw", "write it as id=PATH"),
        ("=x", "adapter id '' is not valid"),
        ("a b=x", "adapter id 'a b' is not valid"),
        ("a=x,y", "'y' is no option; there are gate, template, color, litgpt, length"),
        ("a=x,", "'' is no option"),
        ("a=x,gate=sigmoid", "gate=sigmoid; use tanh or raw"),
        ("a=x,gate", "gate=; use tanh or raw"),
        ("a=x,color=BGR", "color=BGR; use rgb or bgr"),
        ("a=x,gate=raw,gate=tanh", "gate is given twice"),
        ("a=x,length=0", "length=0; use a number from 1 to 1024"),
        ("a=x,length=1025", "from 1 to 1024"),
        ("a=x,length=²", "from 1 to 1024"),
        ("a=x,length=1e2", "from 1 to 1024"),
        ("a=x,template=", "template=''"),
        ("a=x,encoder=clip", "encoder='clip'; use efficientnet-lite0 or open_clip:MODEL:PRETRAINED"),
        ("a=x,encoder=open_clip:", "encoder='open_clip:'"),
        ("a=x,template=../../x", "template='../../x'"),
    ],
)
def test_what_is_wrong_is_named(text: str, match: str):
    with pytest.raises(CheckpointError) as caught:
        parse_adapter_argument(text)
    assert match in str(caught.value)


@given(st.integers(-10, 5000))
def test_every_length_in_range_is_read(length: int):
    try:
        assert parse_adapter_argument(f"a=x,length={length}")[2].length == length
    except CheckpointError:
        assert not 1 <= length <= 1024
    else:
        assert 1 <= length <= 1024


@given(st.text(max_size=60))
def test_any_text_is_understood_or_refused(text: str):
    try:
        id, path, _ = parse_adapter_argument(text)
    except CheckpointError:
        return
    assert id
    assert "," not in str(path)


def test_options_at_run_time_are_the_same():
    assert parse_options("a", {"gate": "raw", "length": "12"}) == AdapterOptions(gate="raw", length=12)
    with pytest.raises(CheckpointError, match="adapter a: 'gates' is no option; there are gate, template"):
        parse_options("a", {"gates": "raw"})

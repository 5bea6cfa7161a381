"""`llama-adapter data`: rows from packages, whole or not at all; hostile packages are refused."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import lzma
import os
import tarfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from train_files import write_lines
from typer.testing import CliRunner

from server.cli import app
from train.data.formats import read_samples
from train.data.rows import read_rows
from train.datasets import archives, noto_emoji, openclipart
from train.datasets.captions import reserved
from train.datasets.gsm8k import instructions
from train.errors import DataError, TrainError
from train.recipe import SourceRecipe

CLIPART = "./usr/share/openclipart/png/"
EMOJI = "package/img/google/64/"

FROG = {"file": "img/0000.webp", "title": "Frog", "orig": "animals/frog.png", "caption": "Frog"}
SNAKE = FROG | {"file": "img/0002.webp", "title": "Snake", "caption": "Snake", "orig": "snake.png"}


def png(color: str, size: tuple[int, int] = (64, 64)) -> bytes:
    data = io.BytesIO()
    Image.new("RGBA", size, color).save(data, "PNG")
    return data.getvalue()


def tar(files: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for name, target in (links or {}).items():
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, target
            archive.addfile(link)
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return data.getvalue()


def deb(data: bytes, name: str = "data.tar.xz") -> bytes:
    """An ar archive as dpkg-deb writes it."""
    parts = {"debian-binary": b"2.0\n", "control.tar.xz": lzma.compress(tar({})) + b"odd"[:1], name: data}
    out = b"!<arch>\n"
    for part, content in parts.items():
        out += f"{part:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode() + content
        out += b"\n" * (len(content) % 2)
    return out


def emoji(image: str, name: str, **fields: Any) -> dict[str, Any]:
    told = {"image": image, "name": name, "short_names": ["x"], "subcategory": "y", "sheet_x": 1}
    return told | {"category": "Animals", "has_img_google": True} | fields


TABLE = [
    emoji("1f438.png", "FROG FACE"),
    emoji("1f3fb.png", "SKIN TONE", category="Component"),
    emoji("1f42a.png", "CAMEL", has_img_google=False),
    emoji("0031-20e3.png", "KEYCAP 1"),  # reserved
    emoji("0032-20e3.png", "KEYCAP 2"),
]


def tgz(table: Any = TABLE) -> bytes:
    pictures = {EMOJI + row["image"]: png("green") for row in TABLE}
    return gzip.compress(tar({"package/emoji.json": json.dumps(table).encode(), **pictures}))


@dataclass
class Packages:
    """Small packages in the places of the real ones."""

    folder: Path
    patch: pytest.MonkeyPatch

    def put(self, source: Any, content: bytes) -> Path:
        file = self.folder / f"{source.NAME}.package"
        file.write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        self.patch.setattr(source, "PACKAGE", replace(source.PACKAGE, sha256=digest, size=len(content)))
        return file

    def arguments(self, clipart: bytes, pictures: bytes) -> list[str]:
        files = self.put(openclipart, clipart), self.put(noto_emoji, pictures)
        return ["--openclipart-deb", str(files[0]), "--emoji-tgz", str(files[1])]


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Packages:
    listed = tmp_path / "list.jsonl"
    write_lines(listed, [FROG, SNAKE | {"linked": "animals/frog.png"}])
    monkeypatch.setattr(openclipart, "LIST", listed)
    return Packages(tmp_path, monkeypatch)


def clipart(picture: bytes | None = None) -> bytes:
    files = {CLIPART + "animals/frog.png": picture or png("#00ff0080", (400, 200)), CLIPART + "b.png": b"?"}
    return deb(lzma.compress(tar(files, {CLIPART + "snake.png": "animals/frog.png"})))


def run(folder: Path, *arguments: str) -> str:
    result = CliRunner().invoke(app, ["data", str(folder), *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def rows_of(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_everything_is_made_and_can_be_trained_on(small: Packages, tmp_path: Path) -> None:
    out = tmp_path / "out"
    told = run(out, *small.arguments(clipart(), tgz()))
    assert "captions.jsonl: 4 pictures" in told
    assert "math.jsonl: left out; give GSM8K's train.jsonl with --gsm8k FILE" in told
    assert rows_of(out / "openclipart" / "captions.jsonl") == [FROG, SNAKE]
    assert rows_of(out / "noto_emoji" / "captions.jsonl")[0] == {
        "file": "img/1f438.png", "name": "frog face", "short_names": ["x"], "category": "Animals",
        "subcategory": "y", "caption": "frog face",
    }  # fmt: skip
    source = SourceRecipe(format="captions", path=(out / "captions.jsonl",), images=out)
    samples = [sample for _, sample in read_samples(source, "caption")]
    assert [sample.key for sample in samples] == ["Frog", "Snake", "frog face", "keycap 2"]
    for sample in samples:
        assert (out / sample.image).is_file()
    assert sorted(path.name for path in out.iterdir()) == ["captions.jsonl", "noto_emoji", "openclipart"]


def test_pictures_are_small_and_over_white(small: Packages, tmp_path: Path) -> None:
    run(tmp_path / "out", *small.arguments(clipart(), tgz()))
    with Image.open(tmp_path / "out" / "openclipart" / "img" / "0000.webp") as picture:
        assert (picture.format, picture.size) == ("WEBP", (160, 80))
        assert np.abs(np.asarray(picture.convert("RGB"), int) - (127, 255, 127)).max() <= 10  # WebP
    linked = (tmp_path / "out" / "openclipart" / "img" / "0002.webp").read_bytes()
    assert linked == (tmp_path / "out" / "openclipart" / "img" / "0000.webp").read_bytes()
    assert (tmp_path / "out" / "noto_emoji" / "img" / "1f438.png").read_bytes() == png("green")


def test_a_picture_too_large_for_memory_comes_out_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    data = io.BytesIO()
    ramp = np.linspace(0, 255, 3000).astype(np.uint8)
    Image.merge("RGBA", [Image.fromarray(np.tile(ramp, (1500, 1)))] * 4).save(data, "PNG")
    whole = openclipart._small(data.getvalue())
    monkeypatch.setattr(openclipart, "DEFAULT_LIMITS", replace(openclipart.DEFAULT_LIMITS, max_pixels=100))
    banded = openclipart._small(data.getvalue())
    one, two = (np.asarray(Image.open(io.BytesIO(image)), int) for image in (whole, banded))
    assert one.shape == two.shape == (80, 160, 3)
    assert np.abs(one - two).max() <= 6
    monkeypatch.setattr(openclipart, "_MAX_PIXELS", 1000)
    with pytest.raises(ValueError, match="more than 1000 pixels"):
        openclipart._small(data.getvalue())


def test_what_is_there_is_kept(small: Packages, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = small.arguments(clipart(), tgz())
    run(out, *arguments)
    (out / "captions.jsonl").unlink()
    before = (out / "openclipart" / "captions.jsonl").stat().st_mtime_ns
    told = run(out)  # needs no package any more
    assert f"{out / 'openclipart'}: is there already" in told
    assert len(rows_of(out / "captions.jsonl")) == 4
    assert (out / "openclipart" / "captions.jsonl").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"PK\x03\x04", "is no Debian package"),
        (deb(b"", "data.tar.zst"), r"holds data\.tar\.zst, only data\.tar\.xz is read"),
        (deb(b"")[:-60], r"holds no data\.tar\.xz"),
        (clipart()[:-160], "cannot be read"),
        (clipart()[:80].replace(b"100644", b"x" * 6), "cannot be read|holds no"),
        (deb(lzma.compress(b"no tar at all" * 99)), "cannot be read"),
        (
            deb(lzma.compress(tar({CLIPART + "../../animals/frog.png": png("red")}))),
            r"lacks .*frog\.png and 0",
        ),
        (deb(lzma.compress(tar({}, {CLIPART + "animals/frog.png": "/etc/hostname"}))), r"lacks .*frog\.png"),
        (clipart(b"\x89PNG\r\n\x1a\nbroken"), r"frog\.png: is corrupt"),
    ],
)
def test_a_hostile_package_leaves_nothing(
    small: Packages, tmp_path: Path, content: bytes, match: str
) -> None:
    arguments = small.arguments(content, tgz())
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(TrainError, match=match):
        run(tmp_path / "out", *arguments)
    assert not list((tmp_path / "out").iterdir())
    assert {path.name for path in tmp_path.iterdir()} == before | {"out"}


@pytest.mark.parametrize(
    "table",
    [
        {"a": 1}, [1], [{"name": "x"}], [emoji("../x.png", "SNAKE")], [emoji("1f438.png", None)],
        [emoji(["x"], "SNAKE")], "x", None, json.loads("[" * 900 + "]" * 900),
    ],
)  # fmt: skip
def test_a_hostile_table_is_refused(small: Packages, tmp_path: Path, table: Any) -> None:
    with pytest.raises(TrainError, match=r"package/emoji\.json is no table of emoji"):
        run(tmp_path / "out", *small.arguments(clipart(), tgz(table)))
    assert not (tmp_path / "out" / "noto_emoji").exists()


def test_archives_are_bounded(small: Packages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = small.arguments(clipart(), tgz())
    monkeypatch.setattr(archives, "_MAX_MEMBER", 100)
    with pytest.raises(TrainError, match=r"frog\.png has \d+ bytes, more than 100"):
        run(tmp_path / "out", *arguments)
    monkeypatch.setattr(archives, "_MAX_UNPACKED", 50)
    with pytest.raises(TrainError, match="unpacks to more than 50 bytes"):
        run(tmp_path / "out", *arguments)


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.deb").write_bytes(clipart())
    with pytest.raises(
        TrainError, match=r"that of openclipart-png 1:0\.18\+dfsg-19 is f07f1545.*--openclipart-deb"
    ):
        run(tmp_path / "out", "--openclipart-deb", str(tmp_path / "x.deb"))
    with pytest.raises(TrainError, match="No such file"):
        run(tmp_path / "out", "--openclipart-deb", str(tmp_path / "nowhere"))


def client(folder: Path, name: str, does: str) -> None:
    program = folder / name
    program.write_text(f"#!/bin/sh\n{does}\n")
    program.chmod(0o755)


def test_packages_are_fetched_by_their_clients(
    small: Packages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = small.arguments(clipart(), tgz())
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin")
    asked = tmp_path / "asked"
    client(tmp_path / "bin", "apt-get", f'echo "$@" >>{asked}; cp {arguments[1]} some.deb')
    client(tmp_path / "bin", "npm", f'echo "$@" >>{asked}; cp {arguments[3]} some.tgz; echo some.tgz')
    run(tmp_path / "out")
    assert asked.read_text().splitlines() == [
        "download openclipart-png=1:0.18+dfsg-19",
        "pack emoji-datasource-google@16.0.0 --ignore-scripts",
    ]
    assert len(rows_of(tmp_path / "out" / "captions.jsonl")) == 4


def test_a_client_that_fails_or_is_not_there_is_told(
    small: Packages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(
        TrainError, match="apt-get is not here to fetch it; give it with --openclipart-deb FILE"
    ):
        run(tmp_path / "out")
    client(tmp_path / "bin", "apt-get", "echo E: no such version >&2; exit 100")
    with pytest.raises(
        TrainError, match=r"could not fetch it \(E: no such version\).*--openclipart-deb FILE"
    ):
        run(tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_gsm8k_becomes_instructions(small: Packages, tmp_path: Path) -> None:
    answer = "She sold 48/2 = <<48/2=24>>24 in May.\nIn all 48+24 = <<48+24=72>>72.\n#### 72"
    file = write_lines(tmp_path / "train.jsonl", [{"question": "How many? ", "answer": answer}])
    out = tmp_path / "out"
    told = run(out, *small.arguments(clipart(), tgz()), "--gsm8k", str(file))
    assert f"{out / 'math.jsonl'}: 1 questions" in told
    assert rows_of(out / "math.jsonl") == [
        {
            "instruction": "How many?",
            "input": "",
            "output": "She sold 48/2 = 24 in May.\nIn all 48+24 = 72.\n#### 72",
            "source": "openai/grade-school-math train",
            "licence": "MIT",
        }
    ]
    assert "math.jsonl: is there already" in run(out)


@pytest.mark.parametrize(
    ("line", "match"),
    [("{", "is not JSON"), ("[]", "has no question"), ('{"question": "x", "answer": 5}', "has no question")],
)
def test_a_row_that_is_none_is_named(tmp_path: Path, line: str, match: str) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text('{"question": "x", "answer": "y"}\n' + line + "\n")
    with pytest.raises(DataError, match=rf"train\.jsonl:2: {match}"):
        list(instructions(file))


def test_the_list_is_sound_and_holds_nothing_reserved() -> None:
    rows = [row.value for row in read_rows(openclipart.LIST)]
    assert len(rows) == len({row["file"] for row in rows}) == len({row["orig"] for row in rows}) == 2628
    for row in rows:
        assert not reserved(row["caption"])
        assert row["caption"] == row["title"]
        assert Path(row["file"]).parts[0] == "img"
        assert len(Path(row["file"]).parts) == 2


def test_reserved_rows_do_not_depend_on_case_or_space() -> None:
    names = [f"thing {number}" for number in range(1000)]
    assert 60 < sum(map(reserved, names)) < 140
    assert [reserved(name) for name in names] == [reserved(f" {name.upper()}\n") for name in names]

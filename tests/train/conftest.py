"""What trainings on a tiny base need."""

from pathlib import Path

import pytest
from tiny_base import write_tiny_base
from train_files import write_captions, write_instructions


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny base."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    write_tiny_base(folder)
    return folder


@pytest.fixture(scope="session")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_instructions(tmp_path_factory.mktemp("instructions") / "rows.jsonl")


@pytest.fixture(scope="session")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`captions.jsonl`, its images beside it."""
    return write_captions(tmp_path_factory.mktemp("pictures") / "captioned")

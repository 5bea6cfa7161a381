"""The rehearsal of images reads the Dockerfile as Docker would, as far as the file goes."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.rehearsal.stages import Builder, Image, parse
from tests.deploy.test_containers import DOCKERFILE, TARGETS

TEXT = """
ARG IMAGE=debian:12
FROM ${IMAGE} AS build
ENV PATH=/opt/venv/bin:$PATH \\
    HOME=/tmp
# a comment
RUN one \\
    && two
FROM build AS app
COPY --from=build --chown=1:1 /opt /opt
USER 10001:10001
ENTRYPOINT ["tini", "--", "app"]
CMD ["serve"]
"""


def test_stages_and_their_instructions() -> None:
    before, stages = parse(TEXT)
    assert before == {"IMAGE": "debian:12"}
    assert [(stage.name, stage.parent) for stage in stages.values()] == [
        ("build", "${IMAGE}"),
        ("app", "build"),
    ]
    assert stages["build"].instructions == (
        ("ENV", "PATH=/opt/venv/bin:$PATH HOME=/tmp"),
        ("RUN", "one && two"),
    )
    assert [word for word, _ in stages["app"].instructions] == ["COPY", "USER", "ENTRYPOINT", "CMD"]


@pytest.fixture
def builder(tmp_path: Path) -> Builder:
    (tmp_path / ".dockerignore").write_text("*\n!kept\n")
    for name in ("kept", "secret"):
        (tmp_path / name).write_text(name)
    return Builder(DOCKERFILE, tmp_path, tmp_path, tmp_path / "stages", [], {"GIVEN": "2"})


def test_what_an_image_is_told(builder: Builder, tmp_path: Path) -> None:
    image = Image(tmp_path / "root", {"PATH": "/bin"})
    for word, rest in (
        ("ARG", "GIVEN=1"),
        ("ARG", "OTHER=3"),
        ("ENV", "PATH=/opt/venv/bin:$PATH N=${GIVEN}"),
        ("WORKDIR", "/src"),
        ("COPY", "kept ./"),
        ("HEALTHCHECK", '--interval=10s CMD ["python", "check"]'),
        ("CMD", '["serve"]'),
    ):
        image = builder.apply(image, word, rest)
    assert image.env == {"PATH": "/opt/venv/bin:/bin", "N": "2", "GIVEN": "2", "OTHER": "3"}
    assert (tmp_path / "root" / "src" / "kept").read_text() == "kept"
    assert (image.healthcheck, image.command) == (("python", "check"), ("serve",))
    assert builder.apply(image, "HEALTHCHECK", "NONE").healthcheck == ()


def test_what_is_not_understood_is_refused(builder: Builder, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="SHELL"):
        builder.apply(Image(tmp_path), "SHELL", '["/bin/bash"]')
    with pytest.raises(RuntimeError, match=r"\.dockerignore leaves it out"):
        builder.apply(Image(tmp_path), "COPY", "secret /")


def test_every_target_of_the_dockerfile_is_read() -> None:
    _, stages = parse(DOCKERFILE.read_text())
    assert set(TARGETS) <= set(stages)
    understood = {
        "ARG", "ENV", "WORKDIR", "COPY", "RUN", "USER", "ENTRYPOINT", "CMD", "HEALTHCHECK", "LABEL", "EXPOSE",
    }  # fmt: skip
    assert {word for stage in stages.values() for word, _ in stage.instructions} <= understood

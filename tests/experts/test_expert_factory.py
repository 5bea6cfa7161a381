import subprocess
import sys
from pathlib import Path

import pytest

from experts.app import create_app
from experts.contract import Expert, ExpertError
from experts.factory import EXPERT_NAMES, ExpertOptions, build_expert
from models.vision.images import ImageLimits


@pytest.mark.parametrize("name", ["ocr", "classifier"])
async def test_it_builds_what_runs_offline(name: str) -> None:
    expert = build_expert(name, ExpertOptions(num_threads=1))
    assert isinstance(expert, Expert)
    assert expert.name == name
    app = create_app([expert])
    async with app.router.lifespan_context(app):
        pass


async def test_the_options_arrive() -> None:
    strict = ExpertOptions(
        ImageLimits(max_bytes=10), ocr_min_confidence=0.75, classifier_min_confidence=0.125
    )
    for name, threshold in (("ocr", "min0.75"), ("classifier", "min0.125")):
        expert = build_expert(name, strict)
        assert expert.version.endswith(threshold)
        with pytest.raises(ExpertError, match="has 11 bytes; at most 10"):
            await expert.read(bytes(11))


def test_unknown_names_and_missing_weights_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ExpertError, match="no expert is called 'oracle'; there are ocr, classifier, caption"):
        build_expert("oracle", ExpertOptions())
    with pytest.raises(ExpertError, match="needs BLIP weights"):
        build_expert("caption", ExpertOptions())
    with pytest.raises(ExpertError, match="holds no BLIP weights"):
        build_expert("caption", ExpertOptions(blip_model=tmp_path))
    assert "caption" in EXPERT_NAMES


@pytest.mark.parametrize("module", ["experts.http", "experts.caption", "experts.contract", "experts.factory"])
def test_what_the_gateway_needs_comes_without_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""How a model's makers would have it sampled, for requests that do not say. Free of torch."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from models.checkpoints.fields import parse, read_json

_FILE = "generation_config.json"


class SamplingDefaults(BaseModel):
    """What Hugging Face's `generation_config.json` may say of sampling, under its names. None: nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31)  # -1 is off, too
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)

    def over(self, other: SamplingDefaults) -> SamplingDefaults:
        """These, and for what they leave out those of `other`."""
        return other.model_copy(update=self.given)

    @property
    def given(self) -> dict[str, int | float]:
        """What is said, by name."""
        fields: dict[str, int | float] = self.model_dump(exclude_none=True)
        return fields


def read_sampling_defaults(base: Path) -> SamplingDefaults:
    """Of the folder of a base; none where it has no such file. Raises CheckpointError naming the field."""
    file = base / _FILE
    if not file.is_file():
        return SamplingDefaults.model_validate({})
    raw = read_json(file)
    return parse(SamplingDefaults, {name: raw.get(name) for name in SamplingDefaults.model_fields}, file)

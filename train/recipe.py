"""The recipe: everything that decides what a training makes, typed, as YAML with overrides.

A recipe says layers relative to its base (`last 30`), since one recipe serves bases of many depths.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from models.adapter_config import (
    AdapterConfig,
    BaseSpec,
    GateConfig,
    Layers,
    LoraConfig,
    PromptConfig,
    ScaleBiasConfig,
    VisionConfig,
)
from train.errors import RecipeError
from train.fields import Strict, find_file, read_fields, sentences, set_field

SHIPPED = Path(__file__).parent / "recipes"

LayerChoice = Annotated[str, Field(pattern=r"^((first|last) [1-9][0-9]{0,3}|all)$")] | Layers


def _listed(value: object) -> object:
    return [value] if isinstance(value, str | Path) else value


def _expanded(value: object) -> object:
    return Path(value).expanduser() if isinstance(value, str) else value


Beta = Annotated[float, Field(ge=0, lt=1)]
UserPath = Annotated[Path, BeforeValidator(_expanded)]


class PromptRecipe(PromptConfig):
    """`PromptConfig` with layers relative to the base."""

    layers: LayerChoice  # type: ignore[assignment]


class VisionRecipe(VisionConfig):
    """`VisionConfig` with layers relative to the base."""

    layers: LayerChoice  # type: ignore[assignment]


class AdapterRecipe(Strict):
    """`AdapterConfig` before it knows its base."""

    prompt: PromptRecipe | None = None
    gate: GateConfig = GateConfig()
    norms: bool = False
    final_norm: bool = False
    head: bool = False
    scale_bias: ScaleBiasConfig = ScaleBiasConfig()
    lora: LoraConfig | None = None
    vision: VisionRecipe | None = None
    template: str = "chat"
    description: str = ""

    def config(self, base: BaseSpec) -> AdapterConfig:
        """The adapter's configuration on this base. Raises RecipeError where it cannot be."""
        fields = self.model_dump() | {"base": base.model_dump()}
        for part in ("prompt", "vision"):
            if fields[part] is not None:
                name = f"adapter.{part}.layers"
                fields[part]["layers"] = _layers(name, fields[part]["layers"], base.num_layers)
        try:
            return AdapterConfig.model_validate(fields)
        except ValidationError as error:
            raise RecipeError(f"recipe: adapter: {sentences(error)}") from error


def _layers(name: str, choice: str | tuple[int, ...], num_layers: int) -> tuple[int, ...]:
    if not isinstance(choice, str):
        return choice
    side, _, number = choice.partition(" ")
    count = int(number) if number else num_layers
    if count > num_layers:
        raise RecipeError(f"recipe: {name}: {choice!r} of a base with {num_layers} layers; give fewer")
    return tuple(range(num_layers - count, num_layers) if side == "last" else range(count))


class InitRecipe(Strict):
    """Where parameters start that are not copied from the base.

    gate  V1 starts them at `zeros` (section 3.2); at `ones`, raw and not trained, prompts are inserted at
          full strength; `normal` draws them from N(0, 1)
    features  `standardized`: the projector's input norm starts where each feature has mean 0 and spread 1
              over the training images; `plain`: at ones and zeros
    """

    gate: Literal["zeros", "ones", "normal"] = "zeros"
    prompt_std: float = Field(default=1.0, gt=0, le=10)
    features: Literal["plain", "standardized"] = "plain"


class SourceRecipe(Strict):
    """One data source.

    path       files, plain or compressed (.gz .bz2 .xz .zst)
    images     the folder that image paths are relative to and must lie in
    question   what is asked of an image that comes with a caption only
    columns    names of the columns of a TSV file without a header
    split      ScienceQA rows of this split only
    trains     which parameters its steps may change: all; `visual`, those of V2's early fusion; `text`,
               the others; or patterns over tensor names, such as `bias.*` or `gate.static`
    epochs     passes over it, if not the optimizer's; 0 trains nothing on it and measures its held-out loss
    holdout    share of rows kept for the held-out loss, chosen by a hash of caption or question, so
               that the same text never lies on both sides
    limit      use its first rows only
    bad_rows   `stop` at the first bad row, or `skip` and report them
    """

    format: Literal["alpaca", "sharegpt", "messages", "captions", "coco", "llava", "scienceqa"]
    path: Annotated[tuple[UserPath, ...], BeforeValidator(_listed), Field(min_length=1)]
    images: UserPath | None = None
    question: str = Field(default="", max_length=4000)
    columns: tuple[str, ...] | None = None
    split: str | None = None
    trains: Literal["all", "visual", "text"] | tuple[str, ...] = "all"
    epochs: float | None = Field(default=None, ge=0)
    holdout: float = Field(default=0.0, ge=0, le=0.5)
    limit: int | None = Field(default=None, gt=0)
    bad_rows: Literal["stop", "skip"] = "stop"


class OptimizerRecipe(Strict):
    """AdamW with linear warm-up and half a cosine, step by step.

    batch_size  rows per step, over all processes: it decides the result, how many processes and passes
                share the rows does not
    base_lr     learning rate per 256 rows, as the reference gives it: lr = base_lr · batch_size / 256
    warmup      share of all steps in which the rate rises from 0
    clip        greatest norm of the gradient; the reference does not clip
    """

    epochs: float = Field(default=1.0, gt=0)
    batch_size: int = Field(gt=0)
    lr: float | None = Field(default=None, gt=0)
    base_lr: float | None = Field(default=None, gt=0)
    min_lr: float = Field(default=0.0, ge=0)
    warmup: float = Field(default=0.0, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    clip: float | None = Field(default=None, gt=0)
    max_steps: int | None = Field(default=None, gt=0)

    @property
    def peak_lr(self) -> float:
        return self.lr or (self.base_lr or 0) * self.batch_size / 256

    @model_validator(mode="after")
    def _one_rate(self) -> Self:
        if (self.lr is None) == (self.base_lr is None):
            raise ValueError("give either `lr` or `base_lr`")
        if self.min_lr > self.peak_lr:
            raise ValueError("`min_lr` exceeds the learning rate")
        return self


class ComputeRecipe(Strict):
    """Where and how; only `augment` and `feature_noise` decide what is learnt, beyond rounding.

    dtype          of the frozen base and the activations; adapters and sums are float32
    attention      `auto`: the Triton kernels on a GPU, torch elsewhere; `torch`; `triton`: not without them
    pass_tokens    tokens that one forward pass may hold; a step's rows are split to fit
    checkpointing  recompute activations instead of keeping them, and on the CPU keep the base's weights once
                   instead of twice
    features       `cached`: each image is encoded once, on disk; `live`: in each step
    augment        RandomResizedCrop as the released 7B pre-training has it; needs `live`
    feature_noise  Gaussian dropout on the features, so that few images are not learnt by heart; needs
                   `cached`
    workers        processes that read rows and decode images; 0 reads in the training process
    """

    device: str = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: Literal["auto", "torch", "triton"] = "auto"
    max_tokens: int = Field(default=512, ge=2)
    pass_tokens: int = Field(default=4096, ge=2)
    checkpointing: bool = False
    features: Literal["cached", "live"] = "cached"
    augment: bool = False
    feature_noise: float = Field(default=0.0, ge=0, le=10)
    workers: int = Field(default=2, ge=0, le=256)
    threads: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.augment and self.features == "cached":
            raise ValueError("`augment` gives each step other pixels; set `features: live`")
        if self.feature_noise and self.features == "live":
            raise ValueError("`feature_noise` is for cached features; with `live` ones use `augment`")
        return self


class KeepRecipe(Strict):
    """Checkpoints and held-out losses every so many steps."""

    checkpoint_every: int = Field(default=500, gt=0)
    checkpoints: int = Field(default=2, gt=0)
    evaluate_every: int = Field(default=500, gt=0)
    evaluate_rows: int = Field(default=512, gt=0)


class Recipe(Strict):
    """base: a path or an id that can be pulled; start_from: an adapter to go on from."""

    base: str
    output: UserPath
    start_from: UserPath | None = None
    resume: bool = False
    seed: int = Field(default=0, ge=0, lt=2**31)
    adapter: AdapterRecipe
    init: InitRecipe = InitRecipe()
    data: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,40}$")], SourceRecipe] = Field(min_length=1)
    optimizer: OptimizerRecipe
    compute: ComputeRecipe = ComputeRecipe()
    keep: KeepRecipe = KeepRecipe()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if all(source.epochs == 0 for source in self.data.values()):
            raise ValueError("data: every source has `epochs: 0`; train on one of them at least")
        vision = self.adapter.vision
        if self.init.features == "standardized" and not (
            vision and vision.input_norm and self.compute.features == "cached"
        ):
            raise ValueError(
                "init.features: `standardized` sets a projector's input norm by the images' cached features; "
                "it needs `adapter.vision.input_norm` and `compute.features: cached`"
            )
        early = vision is not None and vision.fusion == "early"
        for name, source in self.data.items():
            if source.trains in ("visual", "text") and not early:
                raise ValueError(
                    f"data.{name}.trains is `{source.trains}`, but only an adapter with vision and "
                    "`fusion: early` has disjoint groups; use `all` or tensor names"
                )
            captioned = source.format in ("captions", "coco")
            if captioned and not source.question and self.adapter.template != "caption":
                raise ValueError(
                    f"data.{name}.question: the template {self.adapter.template!r} needs a question to put "
                    "before a caption, such as `Generate caption of this image`"
                )
        return self


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe file, or a shipped one by its name, with `key.key=value` on top; values are YAML.

    Raises RecipeError naming file, key and what is wrong with it.
    """
    file = find_file(name, SHIPPED)
    fields = read_fields(file, "recipe", SHIPPED)
    for override in overrides:
        set_field(fields, override)
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        raise RecipeError(f"{file}: {sentences(error)}") from error


def recipe_text(recipe: Recipe, *, brief: bool = False) -> str:
    """YAML of a recipe, as `load_recipe` reads it, with every value or without the defaults."""
    fields = recipe.model_dump(mode="json", exclude_defaults=brief)
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)

"""A study: one recipe in several variants, which are trained alike and compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from train.checkpoints import Checkpoints
from train.errors import RecipeError
from train.fields import Strict, find_file, read_fields, sentences
from train.recipe import Recipe, load_recipe

SHIPPED = Path(__file__).parent / "studies"
_OWN = ("output", "seed", "resume")  # keys that the study gives each run itself


def _distinct(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(seeds)) != len(seeds):
        raise ValueError("a seed is named twice")
    return seeds


def _own(overrides: tuple[str, ...]) -> tuple[str, ...]:
    for override in overrides:
        if _key(override) in _OWN:
            raise ValueError(f"{override!r}: {', '.join(_OWN)} are the study's own; `seeds` repeats a study")
    return overrides


def _key(override: str) -> str:
    return override.partition("=")[0]


Overrides = Annotated[tuple[str, ...], AfterValidator(_own)]


class Variant(Strict):
    """what: for the report's reader; x: its place where losses are drawn over a number, such as layers."""

    what: str = Field(min_length=1, max_length=500)
    overrides: Overrides = ()
    x: float | None = Field(default=None, allow_inf_nan=False)


class Study(Strict):
    """What is compared, and of what it is a test.

    claim      what a paper says, and where: the study's numbers stand beside it
    recipe     a shipped recipe or a file; `overrides`, `key=value` as `llama-adapter train` takes them,
               hold for all variants, those of a variant come after them
    measure    the sources whose losses are reported; each holds out some of its rows
    seeds      each variant is trained once with each
    x_label    what the variants' `x` is
    """

    title: str = Field(min_length=1, max_length=200)
    claim: str = Field(min_length=1, max_length=4000)
    recipe: str
    overrides: Overrides = ()
    measure: tuple[str, ...] = Field(min_length=1)
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**31)], ...], AfterValidator(_distinct)] = Field(
        default=(0,), min_length=1
    )
    x_label: str = ""
    variants: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,39}$")], Variant] = Field(
        min_length=2
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        placed = [variant.x is not None for variant in self.variants.values()]
        if any(placed) != all(placed) or any(placed) != bool(self.x_label):
            raise ValueError("variants: give every variant an `x` and the study an `x_label`, or none of it")
        return self


@dataclass(frozen=True)
class StudyRun:
    """One training of a study; `recipe.output` is its folder."""

    variant: str
    seed: int
    recipe: Recipe

    @property
    def finished(self) -> bool:
        return (self.recipe.output / "report.md").is_file()  # the last that a training writes

    @property
    def begun(self) -> bool:
        checkpoints = Checkpoints(self.recipe.output / "checkpoints", self.recipe.keep.checkpoints)
        return self.finished or checkpoints.last() is not None


def load_study(name: str) -> tuple[Path, Study]:
    """A study file, or a shipped one by its name. Raises RecipeError naming file and key."""
    file = find_file(name, SHIPPED)
    fields = read_fields(file, "study", SHIPPED)
    try:
        return file, Study.model_validate(fields)
    except ValidationError as error:
        raise RecipeError(f"{file}: {sentences(error)}") from error


def plan_runs(file: Path, study: Study, given: Sequence[str], output: Path) -> list[StudyRun]:
    """Every training, the variants of a seed one after another, so that an early end leaves whole seeds.

    `given` stands between the study's overrides and the variants'. Raises RecipeError before anything
    is trained.
    """
    _check_given(file, study, given)
    shared = [*study.overrides, *given]
    return [
        StudyRun(name, seed, _recipe(file, study, name, [*shared, *variant.overrides], seed, output))
        for seed in study.seeds
        for name, variant in study.variants.items()
    ]


def _check_given(file: Path, study: Study, given: Sequence[str]) -> None:
    """Refuse what would not be heeded: what the study or a variant sets itself."""
    for override in given:
        key = _key(override)
        if key in _OWN:
            raise RecipeError(
                f"{override!r}: a study gives each run its own {key}; --output sets the folder, `seeds` in a "
                f"copy of {file} the seeds, and what was begun always goes on"
            )
        for name, variant in study.variants.items():
            for own in map(_key, variant.overrides):
                if f"{own}.".startswith(f"{key}.") or f"{key}.".startswith(f"{own}."):
                    raise RecipeError(
                        f"{override!r}: the variant {name!r} sets {own} itself; change it in a copy of {file}"
                    )


def _recipe(
    file: Path, study: Study, variant: str, overrides: Sequence[str], seed: int, output: Path
) -> Recipe:
    folder = output / variant / f"seed-{seed}"
    try:
        recipe = load_recipe(study.recipe, [*overrides, f"seed={seed}", "resume=true"])
    except RecipeError as error:
        raise RecipeError(f"{file}: variants.{variant}: {error}") from error
    for name in study.measure:
        if name not in recipe.data:
            raise RecipeError(f"{file}: measure: {name!r} is no source; there are: {', '.join(recipe.data)}")
        if not recipe.data[name].holdout:
            raise RecipeError(
                f"{file}: measure: no rows of {name!r} are held out; set data.{name}.holdout=0.1"
            )
    return recipe.model_copy(update={"output": folder})

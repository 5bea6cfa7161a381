"""From a recipe to a run: base, adapter, data, and where an earlier run stopped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from rich.console import Console

from models.adapter import Adapter, base_spec
from models.adapter_config import AdapterConfig, VisionConfig
from models.checkpoints.base import load_base
from models.checkpoints.native import load_adapter
from models.kernels.choice import use_triton
from models.llama import Llama
from models.pull import resolve_base
from models.tokenizer import load_tokenizer
from models.vision.encoder import VisionEncoder, check_features, load_encoder
from train.checkpoints import Checkpoints, load_state
from train.data.batches import ImageReader, Steps
from train.data.images import Images
from train.data.plan import Plan, SourcePlan
from train.data.store import Encoder, ReadImages, Store, prepare, remove_stores
from train.errors import Interrupted, TrainError
from train.forward import Forward
from train.groups import Groups
from train.log import Log
from train.memory import keep_freed_memory
from train.output import put_in_place, write_whole
from train.processes import Processes, StopSignal
from train.products import multiplies_bfloat16, pack_products
from train.recipe import ComputeRecipe, Recipe, recipe_text
from train.standardize import standardize
from train.trainer import HeldOut, Trainer

RECIPE = "recipe.yaml"
# Where a run computes decides nothing but rounding.
WHERE = (
    "resume",
    "output",
    "compute.device",
    "compute.attention",
    "compute.pass_tokens",
    "compute.checkpointing",
    "compute.workers",
    "compute.threads",
)
# What may differ when a run goes on: where it computes, what it keeps, and what mends a bad learning rate.
# The steps and their rows must stay the same.
_MAY_CHANGE = (
    *WHERE,
    "keep",
    "optimizer.lr",
    "optimizer.base_lr",
    "optimizer.min_lr",
    "optimizer.warmup",
    "optimizer.weight_decay",
    "optimizer.clip",
)


@dataclass(frozen=True)
class Run:
    """All that a training is made of."""

    recipe: Recipe
    dtype: torch.dtype  # of the base
    adapter: Adapter
    groups: Groups
    trainer: Trainer
    plan: Plan
    steps: Steps
    stores: Mapping[str, Store]
    read_image: ImageReader
    checkpoints: Checkpoints

    def train(self, stop: StopSignal, log: Log | None) -> bool:
        """To the end, or to a signal: False."""
        start, keep = self.trainer.finished_steps, self.recipe.keep
        held_out = [
            HeldOut(name, store, [int(row) for row in store.held_out[: keep.evaluate_rows]])
            for name, store in self.stores.items()
            if len(store.held_out)
        ]
        steps = self.steps.load(start, self.recipe.compute.workers if start < len(self.plan) else 0)
        return self.trainer.run(steps, held_out, self.read_image, self.checkpoints, log, stop)


def build(recipe: Recipe, cache_dir: Path, processes: Processes, stop: StopSignal, console: Console) -> Run:
    """Open, check and prepare everything. Raises ModelError for whatever cannot be used."""
    compute = recipe.compute
    if compute.threads:
        torch.set_num_threads(compute.threads)
    keep_freed_memory()
    checkpoints = Checkpoints(recipe.output / "checkpoints", recipe.keep.checkpoints)
    last = _check_output(recipe, checkpoints, processes)
    dtype = _dtype(compute, processes, console)
    path = resolve_base(recipe.base, cache_dir)
    base, print_ = load_base(path, dtype, processes.device)
    adapter = _adapter(recipe, base, print_, last).to(processes.device)
    groups = Groups(adapter, [source.trains for source in recipe.data.values()])
    vision = adapter.config.vision
    tokens = Encoder(
        load_tokenizer(path),
        recipe.adapter.template,
        compute.max_tokens,
        base.config.vocab_size,
        sees=vision is not None,
    )
    encoder = _encoder(vision, processes.device) if vision else None
    images = Images(compute, vision, encoder, cache_dir, stop)
    stores = _stores(recipe, tokens, images.read_all, processes, stop, console)
    plan = _plan(recipe, stores)
    if not compute.checkpointing:  # which is for who has time and no memory
        pack_products(base)
    forward = Forward(
        base, adapter, encoder, compute.features == "live", compute.checkpointing, _use_triton(compute, base)
    )
    trainer = Trainer(recipe, adapter, groups, forward, processes, len(plan))
    if last is not None:
        trainer.restore(load_state(last))
    read = images.reader(stores.values())
    if recipe.init.features == "standardized" and last is None and recipe.start_from is None:
        standardize(adapter, stores.values(), read)
    steps = Steps(
        plan, list(stores.values()), read, compute.pass_tokens, processes.rank, processes.world, recipe.seed
    )
    return Run(recipe, dtype, adapter, groups, trainer, plan, steps, stores, read, checkpoints)


def _dtype(compute: ComputeRecipe, processes: Processes, console: Console) -> torch.dtype:
    """The recipe's, but float32 for bfloat16 on a processor without instructions for it: that took 1/47."""
    wanted: torch.dtype = getattr(torch, compute.dtype)
    if wanted != torch.bfloat16 or processes.device.type != "cpu" or multiplies_bfloat16():
        return wanted
    if processes.first:
        console.print(
            "This processor has no instructions for bfloat16; float32 is used, which it is fast in."
        )
    return torch.float32


def _plan(recipe: Recipe, stores: Mapping[str, Store]) -> Plan:
    optimizer = recipe.optimizer
    sources = [
        SourcePlan(name, stores[name].train, optimizer.epochs if source.epochs is None else source.epochs)
        for name, source in recipe.data.items()
    ]
    return Plan(sources, optimizer.batch_size, recipe.seed, optimizer.max_steps)


def _check_output(recipe: Recipe, checkpoints: Checkpoints, processes: Processes) -> Path | None:
    """The checkpoint to go on from. No run is overwritten, or gone on with by another recipe."""
    last = checkpoints.last()
    file = recipe.output / RECIPE
    processes.any(False)  # nobody writes before all have looked
    if last is not None and not recipe.resume:
        raise TrainError(
            f"{recipe.output}: holds a training already ({last.name}); add resume=true to go on with it, "
            "or choose another output"
        )
    if last is None and (recipe.output / "adapter").exists():
        raise TrainError(
            f"{recipe.output}: holds an adapter, but no checkpoint to go on from; choose another output, or "
            "move `adapter` away"
        )
    if last is not None:
        check_same(file, recipe)
    if processes.first:
        recipe.output.mkdir(parents=True, exist_ok=True)
        if last is None:
            remove_stores(recipe.output / "data")  # perhaps another recipe's
        write_whole(file, [recipe_text(recipe)])
    return last


def check_same(file: Path, recipe: Recipe, free: tuple[str, ...] = _MAY_CHANGE) -> None:
    """Raises TrainError where the recipe of a begun run, `file`, differs in more than the `free` keys."""
    try:
        before = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TrainError(
            f"{file}: cannot be read ({error}); restore it, or train to another output"
        ) from error
    then, now = _flat(before), _flat(recipe.model_dump(mode="json"))
    changed = [
        key
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key) and not any(f"{key}.".startswith(f"{prefix}.") for prefix in free)
    ]
    if changed:
        raise TrainError(
            f"{file}: the run was begun with another recipe; {', '.join(changed[:5])} changed: "
            "set them back, or train to another output"
        )


def _flat(value: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(value, dict):
        return {prefix: value}
    inner = [_flat(item, f"{prefix}.{key}" if prefix else str(key)) for key, item in value.items()]
    return {key: item for part in inner for key, item in part.items()}


def _adapter(recipe: Recipe, base: Llama, fingerprint: str, last: Path | None) -> Adapter:
    """A fresh adapter, or the one to go on from; its configuration must be the recipe's."""
    config = recipe.adapter.config(base_spec(base.config, fingerprint))
    source = last or recipe.start_from
    if source is not None:
        adapter = load_adapter(source, base.config, fingerprint)
        _check_config(source, adapter.config, config)
        fresh = Adapter(config)
        fresh.load_state_dict(adapter.state_dict())
        return fresh
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        adapter = Adapter(config).start_from(base)
        with torch.no_grad():
            if config.prompt:
                adapter.prompt.mul_(recipe.init.prompt_std)
            if config.gated_layers and recipe.init.gate == "normal":
                adapter.gate.normal_()
            elif config.gated_layers and recipe.init.gate == "ones":
                adapter.gate.fill_(1)
    return adapter


def _check_config(source: Path, have: AdapterConfig, want: AdapterConfig) -> None:
    skip = {"description", "template"}
    have_fields, want_fields = _flat(have.model_dump(exclude=skip)), _flat(want.model_dump(exclude=skip))
    wrong = [key for key in want_fields | have_fields if have_fields.get(key) != want_fields.get(key)]
    if wrong:
        raise TrainError(
            f"{source}: is another kind of adapter than the recipe's: {', '.join(wrong[:5])} differ"
        )


def _use_triton(compute: ComputeRecipe, base: Llama) -> bool:
    try:
        return use_triton(compute.attention, base.device, base.dtype, base.config.head_dim)
    except ValueError as error:
        raise TrainError(f"compute.{error}") from error


def _encoder(vision: VisionConfig, device: torch.device) -> VisionEncoder:
    encoder = load_encoder(vision.encoder, device)
    check_features(vision, encoder)
    return encoder


def _stores(
    recipe: Recipe,
    encoder: Encoder,
    read_images: ReadImages,
    processes: Processes,
    stop: StopSignal,
    console: Console,
) -> dict[str, Store]:
    """Each source, prepared once in the output folder by the first process; a resumed run reuses it."""
    folder, stopped = recipe.output / "data", False
    try:
        for name in recipe.data if processes.first else ():
            if not (folder / name).is_dir():
                _prepare(recipe, name, encoder, folder, read_images, stop, console)
    except Interrupted:
        stopped = True
    if processes.any(stopped):
        raise Interrupted
    return {name: Store(folder / name) for name in recipe.data}


def _prepare(
    recipe: Recipe,
    name: str,
    encoder: Encoder,
    folder: Path,
    read_images: ReadImages,
    stop: StopSignal,
    console: Console,
) -> None:
    """One source, built beside its place and renamed when complete."""
    partial = folder / f".{name}.partial"
    with console.status(f"reading {name}") as status:

        def progress(count: int) -> None:
            stop.check()
            if count % 1000 == 0:
                status.update(f"reading {name}: {count:,} rows")

        summary = prepare(name, recipe.data[name], encoder, partial, read_images, progress).summary
    put_in_place(partial, folder / name)
    console.print(
        f"{name}: {summary.used:,} rows to train on, {summary.held_out:,} held out, "
        f"{summary.bad:,} bad, {summary.truncated:,} cut at {recipe.compute.max_tokens} tokens"
    )
    for fault in (summary.faults or [])[:3]:
        console.print(f"  {fault}", highlight=False)

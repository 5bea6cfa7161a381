"""What the aims have become, and plots: `python bench/report.py`, after the measurements of `make bench`.

Reads their JSON files, and says of each aim whether it is reached; what was not measured is left out.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from bursts import Burst, ratios
from compare import OURS, OURS_BARE, PEFT, QUANTIZED, VLLM
from engine import BASE, CONTENDERS, ONE_V1
from many_adapters import FEW
from matplotlib.figure import Figure
from scheduling import SORTS, percentile

Found = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Aim:
    name: str
    wanted: float
    values: tuple[float, ...]  # of the rounds, or the only one; none was not measured
    at_most: bool = False

    @property
    def reached(self) -> bool:
        value = statistics.median(self.values)
        return value <= self.wanted if self.at_most else value >= self.wanted

    @property
    def row(self) -> str:
        wanted = f"{'≤' if self.at_most else '≥'} {self.wanted:g}"
        spread = f"{min(self.values):.2f} to {max(self.values):.2f}" if len(self.values) > 1 else ""
        value = statistics.median(self.values)
        return f"| {self.name} | {wanted} | {value:.2f} | {spread} | {'yes' if self.reached else 'no'} |"


def _bursts(found: Found) -> list[Burst]:
    return [Burst(**one) for one in found["bursts"]]


def _select(bursts: Sequence[Burst], name: str, at_once: int, tokens: int) -> list[Burst]:
    return [b for b in bursts if (b.contender, b.at_once, b.prompt_tokens) == (name, at_once, tokens)]


def of_compare(found: Found) -> Iterator[Aim]:
    bursts, tokens = _bursts(found), found["load"]["prompt_tokens"]
    for level in found["load"]["levels"]:
        ours = _select(bursts, OURS.name, level, tokens)
        for name, wanted in ((PEFT, 4.0), (VLLM, 1.0), ("llama.cpp, bf16", 1.0)):
            values = ratios(ours, _select(bursts, name, level, tokens))
            yield Aim(f"tok/s with one V1 adapter over {name}, {level} at once", wanted, tuple(values))
    for name, alike in QUANTIZED.items():
        for other, wanted in ((PEFT, 4.0), (alike, 1.0)):
            values = ratios(_select(bursts, name, 1, tokens), _select(bursts, other, 1, tokens))
            yield Aim(f"tok/s of {name}, over {other}, 1 at once", wanted, tuple(values))
    theirs, own = (_ttfts(_select(bursts, name, 1, 512)) for name in (VLLM, OURS.name))
    values = tuple(theirs[number] / own[number] for number in own if number in theirs)
    yield Aim(f"TTFT of 512 tokens of {VLLM}, over ours", 1.0, values)


def _ttfts(bursts: Sequence[Burst]) -> dict[int, float]:
    """The median of each round."""
    rounds = dict.fromkeys(burst.round for burst in bursts)
    return {number: statistics.median(b.ttft for b in bursts if b.round == number) for number in rounds}


def of_engine(found: Found) -> Iterator[Aim]:
    bursts, load = _bursts(found), found["load"]
    level = max(load["levels"])
    base = _select(bursts, BASE.name, level, load["prompt_tokens"])
    for contender in CONTENDERS[1:]:
        values = ratios(_select(bursts, contender.name, level, load["prompt_tokens"]), base)
        yield Aim(f"tok/s with {contender.name} over the bare base, {level} at once", 0.97, tuple(values))


def of_many_adapters(found: Found) -> Iterator[Aim]:
    bursts, load = _bursts(found), found["load"]
    few = [one for one in bursts if one.contender == FEW.name]
    most = [one for one in bursts if one.contender == f"64 of {load['registered']} registered"]
    yield Aim(f"tok/s with 64 adapters of {load['registered']} over 8 of 8", 0.95, tuple(ratios(most, few)))


def of_scheduling(found: Found) -> Iterator[Aim]:
    itl = [gap for sample in found["samples"] for gap in sample["gaps"]]
    worst = percentile(itl, 0.99) / statistics.median(itl)
    yield Aim("p99 ITL over the median, mixed load", 3.0, (worst,), at_most=True)
    yield Aim("TTFT of 512 tokens over the same asked again", 5.0, tuple(a / b for a, b in found["hits"]))
    longest = max(found["disturbed"]) / statistics.median(found["quiet"])
    yield Aim("longest step while adapters come and go, over the median", 1.2, (longest,), at_most=True)


def of_train_step(found: Found) -> Iterator[Aim]:
    ours = found["seconds"]["ours"]
    for name, wanted in (("adaption_prompt", 1.0), ("lora", 1.0), ("full", 2.0)):
        values = tuple(a / b for a, b in zip(found["seconds"][name], ours, strict=True))
        yield Aim(f"training step of {name}, over ours", wanted, values)


_READERS: dict[str, Callable[[Found], Iterator[Aim]]] = {
    "compare": of_compare,
    "engine": of_engine,
    "many_adapters": of_many_adapters,
    "scheduling": of_scheduling,
    "train_step": of_train_step,
}


def _medians(bursts: Sequence[Burst], name: str, tokens: int) -> tuple[list[int], list[float]]:
    """Tokens per second by requests at once."""
    mine = [one for one in bursts if one.contender == name and one.prompt_tokens == tokens]
    levels = sorted({one.at_once for one in mine})
    return levels, [statistics.median(b.decode for b in mine if b.at_once == level) for level in levels]


def plot_throughput(engine: Found | None, compare: Found | None, path: Path) -> None:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    if engine is not None:
        bursts, tokens = _bursts(engine), engine["load"]["prompt_tokens"]
        for contender in (BASE, ONE_V1):
            axes.plot(*_medians(bursts, contender.name, tokens), marker="o", label=f"ours, {contender.name}")
    if compare is not None:
        bursts, tokens = _bursts(compare), compare["load"]["prompt_tokens"]
        for name in dict.fromkeys(b.contender for b in bursts):
            if name not in (OURS.name, OURS_BARE.name):
                axes.plot(*_medians(bursts, name, tokens), marker="s", linestyle="--", label=name)
    axes.set(xlabel="requests at once", ylabel="decode tokens/s", xscale="log", yscale="log")
    levels = (1, 2, 4, 8, 16)
    axes.set_xticks(levels, [str(level) for level in levels], minor=False)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path)


def plot_price(found: Found, path: Path) -> None:
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    bursts, registered = _bursts(found), found["load"]["registered"]
    base = [one for one in bursts if one.contender == BASE.name]
    numbers, middle, low, high = [0], [1.0], [1.0], [1.0]
    for name in dict.fromkeys(one.contender for one in bursts):
        if name.endswith(f" of {registered} registered"):
            values = ratios([one for one in bursts if one.contender == name], base)
            numbers.append(int(name.split()[0]))
            middle.append(statistics.median(values))
            low.append(values[0])
            high.append(values[-1])
    places = range(len(numbers))
    axes.fill_between(places, low, high, alpha=0.2)
    axes.plot(places, middle, marker="o")
    axes.set_xticks(places, [str(number) for number in numbers])
    axes.set(xlabel="adapters in the batch", ylabel="tokens/s over the bare base", ylim=(0.7, 1.1))
    axes.grid(alpha=0.3)
    figure.savefig(path)


def plot_latency(found: Found, path: Path) -> None:
    figure = Figure(figsize=(8, 3), layout="constrained")
    itl_axes, ttft_axes = figure.subplots(1, 2)
    for sort in SORTS:
        mine = [sample for sample in found["samples"] if sample["sort"] == sort.name]
        for axes, values in (
            (itl_axes, [gap for sample in mine for gap in sample["gaps"]]),
            (ttft_axes, [sample["ttft"] for sample in mine]),
        ):
            ordered = sorted(1e3 * value for value in values)
            axes.plot(ordered, [(i + 1) / len(ordered) for i in range(len(ordered))], label=sort.name)
    for axes, name in ((itl_axes, "ITL, ms"), (ttft_axes, "TTFT, ms")):
        axes.set(xlabel=name, xscale="log", ylabel="share of them")
        axes.grid(alpha=0.3)
    itl_axes.legend()
    figure.savefig(path)


def main(
    folder: Annotated[Path, typer.Option(help="where the measurements lie")] = Path("bench/out"),
    plots: Annotated[Path, typer.Option(help="folder for the plots")] = Path("bench/out"),
) -> None:
    """Say which aims are reached, and plot."""
    found = {
        name: json.loads(path.read_text()) for name in _READERS if (path := folder / f"{name}.json").exists()
    }
    lines = ["| aim | wanted | measured | min to max | reached |", "|---|---:|---:|---|---|"]
    lines += [aim.row for name, one in found.items() for aim in _READERS[name](one) if aim.values]
    missing = found.get("compare", {}).get("missing", {})
    lines += ["", *(f"Not compared with {name}: {why}." for name, why in missing.items())]
    lines += [f"Not measured: {name}." for name in _READERS if name not in found]
    text = "\n".join(lines).rstrip()
    print(text)
    (folder / "report.md").write_text(text + "\n")
    plots.mkdir(parents=True, exist_ok=True)
    if "engine" in found or "compare" in found:
        plot_throughput(found.get("engine"), found.get("compare"), plots / "throughput.svg")
    if "many_adapters" in found:
        plot_price(found["many_adapters"], plots / "price.svg")
    if "scheduling" in found:
        plot_latency(found["scheduling"], plots / "latency.svg")


if __name__ == "__main__":
    typer.run(main)

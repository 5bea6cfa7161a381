"""The Triton kernels on this machine's GPU, in under eight minutes: `python bench/kernels.py`.

First each agrees with the formula in float64 on fresh random inputs, or the script ends with 1. Then:

decode    the fraction of measured copy bandwidth, for the heads of 7B, 13B and 65B
prefill   TFLOP/s of chunks, with and without a context
train     TFLOP/s of forward and backward, packed sequences

each beside the unfused formula in plain torch on the same inputs, in turn. A shape that does not fit the
memory, or that the time did not reach, is reported as such.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from kernel_cases import PackedCase, PagedCase, unfused
from torch import Tensor

HEADS = {"7B": 32, "13B": 40, "65B": 64}
HEAD_DIM, PAGE, PROMPTS = 128, 16, 10
BATCHES, CONTEXTS = (1, 4, 16, 64, 256), (128, 512, 2048, 8192, 16384)
CHUNKS = ((1, 512, 0), (1, 2048, 0), (8, 512, 0), (1, 512, 4096), (8, 256, 2048), (1, 512, 15872))
PASSES = ((16, 256), (8, 512), (4, 2048))
BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
# Few: each is compiled anew, float32 slowest.
CHECKED = [((32, 32), 128, BFLOAT16), ((32, 8), 128, BFLOAT16), ((9, 3), 64, BFLOAT16)]
CHECKED += [((32, 32), 128, FLOAT16), ((9, 3), 64, FLOAT32)]
TOLERANCE = {FLOAT32: 1e-4, BFLOAT16: 2e-2, FLOAT16: 3e-3}
_ROUNDS = 5
_UNCACHED = 1 << 30  # bytes that launches in turn must touch, lest they read each other's from the L2 cache
_LAUNCHES = 64

Launch = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One shape. `rate` is a fraction of the copy bandwidth, or TFLOP/s; `over_torch` a ratio of times."""

    kernel: str
    heads: str
    batch: int
    new: int
    context: int
    us: float | None = None
    rate: float | None = None
    over_torch: tuple[float, float, float] | None = None  # median, least, most
    note: str = ""


def in_graph(launches: Sequence[Launch]) -> Launch:
    """All of them captured once: what is timed then is the device, not Python."""
    launches[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    return graph.replay


def seconds(launch: Launch) -> float:
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    launch()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / 1e3


def in_turn(
    ours: Sequence[Launch], theirs: Sequence[Launch] | None, captured: bool = True
) -> tuple[float, tuple[float, float, float] | None]:
    """Median seconds of one of ours, and the ratio of one of theirs over it within a round."""
    sides = [ours] if theirs is None else [ours, theirs]
    runs = [(in_graph(side) if captured else side[0], len(side) if captured else 1) for side in sides]
    for run, _ in runs:
        run()
    times = [[seconds(run) / count for run, count in runs] for _ in range(_ROUNDS)]
    middle = statistics.median(own for own, *_ in times)
    if theirs is None:
        return middle, None
    ratios = sorted(other / own for own, other in times)
    return middle, (statistics.median(ratios), ratios[0], ratios[-1])


def copy_bandwidth() -> float:
    """Bytes read and written a second by torch's copy of a GiB."""
    x, y = torch.empty(2, 1 << 30, dtype=torch.uint8, device="cuda").unbind()
    y.copy_(x)
    return 2 * x.numel() / min(seconds(lambda: y.copy_(x)) for _ in range(20))


def paged_arguments(case: PagedCase) -> list[Tensor]:
    return [case.prompt_k_SKGD, case.prompt_v_SKGD, case.slots_B, case.prompt_lens_S, case.gate_SH]


def check(seed: int) -> list[dict[str, Any]]:
    """The largest error of each kernel and precision against float64; exits where one is too large."""
    worst: dict[tuple[str, str], dict[str, Any]] = {}
    for heads, head_dim, dtype in CHECKED:
        tolerance = TOLERANCE[dtype]
        for kernel, error in errors_of(heads, head_dim, dtype, seed):
            if not error <= tolerance:
                raise SystemExit(
                    f"{kernel} in {dtype} with {heads} heads is off by {error:.1e} (seed {seed})."
                )
            key = (kernel, str(dtype).removeprefix("torch."))
            row = worst.setdefault(key, {"kernel": kernel, "dtype": key[1], "error": 0.0})
            row["error"] = max(row["error"], error)
    return list(worst.values())


def gap(out: Tensor, expected: Tensor) -> float:
    """The largest difference; of numbers over 1 as a part of them, as their rounding is."""
    return float(((out.double() - expected).abs() / expected.abs().clamp(min=1)).max())


def errors_of(
    heads: tuple[int, int], head_dim: int, dtype: torch.dtype, seed: int
) -> Iterator[tuple[str, float]]:
    """The largest error of each kernel; gradients' by half the largest of each, since they are sums."""
    from models.kernels.packed import Packing, packed_attention
    from models.kernels.paged_decode import paged_decode
    from models.kernels.paged_prefill import paged_prefill

    options: Any = {"heads": heads, "head_dim": head_dim, "dtype": dtype, "device": "cuda", "seed": seed}
    lens, prompt_lens, slots = (1, 33, 2000, 700), (0, 1, 10, 20), (3, 0, 1, 2)
    c = PagedCase.random(lens, (1,) * 4, prompt_lens, slots, **options)
    for splits in (None, 1, 7):
        out = paged_decode(c.q_NHD, c.k_PsGD, c.v_PsGD, c.blocks_BM, c.lens_B, *paged_arguments(c), splits)
        yield "decode", gap(out, c.plain())
    c = PagedCase.random(lens, (1, 33, 600, 5), prompt_lens, slots, **options)
    cache = (c.q_NHD, c.k_PsGD, c.v_PsGD, c.blocks_BM)
    out = paged_prefill(*cache, c.starts, c.lens_B, 600, *paged_arguments(c))
    yield "prefill", gap(out, c.plain())
    p = PackedCase.random((600, 1, 77), prompt_lens, (3, 0, 2), **options)
    packing = Packing.of(p.lens_B, p.slots_B, p.q_NHD.device)
    mine = [x.clone().requires_grad_() for x in p.leaves]
    exact = [x.double().requires_grad_() for x in p.leaves]
    out = packed_attention(*mine[:5], p.prompt_lens_S, mine[5], packing)
    expected = p.plain(*exact)
    yield "train", gap(out.detach(), expected.detach())
    grads = torch.autograd.grad(out.sum(), mine), torch.autograd.grad(expected.sum(), exact)
    for one, two in zip(*grads, strict=True):
        yield "train, gradients", float((one - two).abs().max() / (2 * two.abs().max().clamp(min=1)))


def decode(name: str, batch: int, context: int, bandwidth: float) -> Row:
    from models.kernels.paged_decode import paged_decode

    H, D, row = HEADS[name], HEAD_DIM, Row("decode", name, batch, 1, context)
    blocks = batch * context // PAGE
    of_block = 2 * PAGE * H * D * 2
    launches = max(1, min(_LAUNCHES, _UNCACHED // (blocks * of_block)))
    free = torch.cuda.mem_get_info()[0]
    if blocks * launches * of_block > 0.8 * free:
        return Row(**(asdict(row) | {"note": "does not fit"}))
    k, v = (torch.empty(blocks * launches, PAGE, H, D, dtype=BFLOAT16, device="cuda").normal_() for _ in "kv")
    tables = torch.randperm(blocks * launches, device="cuda").int().view(launches, batch, -1)
    rest = PagedCase.random(
        [1] * batch, [1] * batch, [0, PROMPTS], [1] * batch, heads=(H, H), head_dim=D,
        dtype=BFLOAT16, device="cuda",
    )  # fmt: skip
    arguments, lens_B = paged_arguments(rest), torch.full_like(rest.lens_B, context)
    ours = [partial(paged_decode, rest.q_NHD, k, v, t, lens_B, *arguments) for t in tables]
    theirs = None
    if 3 * blocks * of_block < torch.cuda.mem_get_info()[0]:  # what is gathered, and a copy of it
        theirs = [partial(unfused, rest.q_NHD, k, v, t, context, *arguments) for t in tables[:4]]
    took, ratio = in_turn(ours, theirs)
    moved = blocks * of_block + 2 * batch * PROMPTS * H * D * 2 + 2 * batch * H * D * 2
    return Row("decode", name, batch, 1, context, 1e6 * took, moved / took / bandwidth, ratio)


def prefill(name: str, batch: int, new: int, context: int) -> Row:
    from models.kernels.paged_prefill import paged_prefill

    H, D, length = HEADS[name], HEAD_DIM, context + new
    c = PagedCase.random(
        [length] * batch, [new] * batch, [0, PROMPTS], [1] * batch, heads=(H, H), head_dim=D,
        dtype=BFLOAT16, device="cuda",
    )  # fmt: skip
    cache, arguments = (c.q_NHD, c.k_PsGD, c.v_PsGD, c.blocks_BM), paged_arguments(c)
    ours = [partial(paged_prefill, *cache, c.starts, c.lens_B, new, *arguments)] * 4
    took, ratio = in_turn(ours, [partial(unfused, *cache, length, *arguments)])
    pairs = batch * (new * context + new * (new + 1) // 2 + new * PROMPTS)
    return Row("prefill", name, batch, new, context, 1e6 * took, 4 * H * D * pairs / took / 1e12, ratio)


def train(name: str, batch: int, length: int) -> Row:
    from models.kernels.packed import Packing, packed_attention

    H, D = HEADS[name], HEAD_DIM
    p = PackedCase.random(
        [length] * batch,
        [PROMPTS],
        [0] * batch,
        heads=(H, H),
        head_dim=D,
        dtype=BFLOAT16,
        device="cuda",
    )
    leaves = [x.requires_grad_() for x in p.leaves]
    packing = Packing.of(p.lens_B, p.slots_B, p.q_NHD.device)
    grad = torch.randn_like(p.q_NHD)

    def ours() -> object:
        out = packed_attention(*leaves[:5], p.prompt_lens_S, leaves[5], packing)
        return torch.autograd.grad(out, leaves, grad)

    def theirs() -> object:
        return torch.autograd.grad(p.unfused(*leaves), leaves, grad)

    took, ratio = in_turn([ours], [theirs], captured=False)
    pairs = batch * (length * (length + 1) // 2 + length * PROMPTS)
    operations = 4 * H * D * pairs * 3.5  # two products forward, five backward
    return Row("train", name, batch, length, 0, 1e6 * took, operations / took / 1e12, ratio)


def shapes(bandwidth: float) -> Iterator[tuple[Row, Callable[[], Row]]]:
    """The small tables first, then decode from the ends of the ranges inward."""
    for batch, new, context in CHUNKS:
        for name in HEADS:
            yield Row("prefill", name, batch, new, context), partial(prefill, name, batch, new, context)
    for batch, length in PASSES:
        yield Row("train", "7B", batch, length, 0), partial(train, "7B", batch, length)
    for context in CONTEXTS:
        for batch in BATCHES:
            for name in HEADS:
                yield Row("decode", name, batch, 1, context), partial(decode, name, batch, context, bandwidth)


def measure(bandwidth: float, deadline: float) -> list[Row]:
    rows = []
    for row, run in shapes(bandwidth):
        if time.monotonic() > deadline:
            done = Row(**(asdict(row) | {"note": "not reached in time"}))
        else:
            try:
                done = run()
            except torch.OutOfMemoryError:
                done = Row(**(asdict(row) | {"note": "does not fit"}))
        torch.cuda.empty_cache()
        rows.append(done)
        print(done, file=sys.stderr)
    return rows


def table(facts: dict[str, Any], errors: list[dict[str, Any]], rows: list[Row]) -> str:
    lines = [
        f"{facts['gpu']}, torch {facts['torch']}, Triton {facts['triton']}, "
        f"copy {facts['copy_gb_s']:.0f} GB/s, seed {facts['seed']}, bfloat16, {PROMPTS} prompt rows",
        "",
        "| kernel | precision | largest error against float64 |",
        "|---|---|---:|",
        *(f"| {e['kernel']} | {e['dtype']} | {e['error']:.1e} |" for e in errors),
        "",
        "| kernel | heads of | batch | new tokens | context | µs | of copy, or TFLOP/s | torch over ours |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        shape = f"| {row.kernel} | {row.heads} | {row.batch} | {row.new} | {row.context} |"
        if row.us is None or row.rate is None:
            lines.append(f"{shape} {row.note} | | |")
            continue
        rate = f"{100 * row.rate:.0f} %" if row.kernel == "decode" else f"{row.rate:.0f} TFLOP/s"
        ratio = "" if row.over_torch is None else "{:.1f} ({:.1f} to {:.1f})".format(*row.over_torch)
        lines.append(f"{shape} {row.us:.0f} | {rate} | {ratio} |")
    return "\n".join(lines)


def main(
    minutes: Annotated[float, typer.Option(help="after which no shape is begun")] = 7.0,
    seed: Annotated[int | None, typer.Option(help="of the inputs; default: fresh")] = None,
    output: Annotated[Path, typer.Option(help="a folder for kernels.json and kernels.md")] = Path(
        "bench/out"
    ),
) -> None:
    """Measure the Triton kernels on this machine's GPU."""
    deadline = time.monotonic() + 60 * minutes
    if not torch.cuda.is_available():
        raise SystemExit("There is no GPU here that torch can use; bench/kernels.py measures nothing else.")
    import triton

    seed = int(time.time()) if seed is None else seed
    errors = check(seed)
    bandwidth = copy_bandwidth()
    torch.cuda.empty_cache()
    facts = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "seed": seed,
        "copy_gb_s": bandwidth / 1e9,
    }
    rows = measure(bandwidth, deadline)
    text = table(facts, errors, rows)
    print(text)
    output.mkdir(parents=True, exist_ok=True)
    found = {**facts, "errors": errors, "rows": [asdict(row) for row in rows]}
    (output / "kernels.json").write_text(json.dumps(found, indent=2))
    (output / "kernels.md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)

"""Adapters with random weights, for load and for sizes: `python bench/random_adapters.py OUT --count 8`.

They have the papers' shapes on the given base and say nothing sensible; what they cost is real.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer

from models.adapter import Adapter, base_spec
from models.adapter_config import (
    LINEARS,
    AdapterConfig,
    BaseSpec,
    PromptConfig,
    ScaleBiasConfig,
    VisionConfig,
)
from models.checkpoints.base import open_base
from models.checkpoints.native import save_adapter
from models.pull import resolve_base
from server.settings import default_cache_dir


class Kind(StrEnum):
    v1 = "v1"  # 10 prompt rows in all layers but two
    v2 = "v2"  # the same, with norms, biases and output scales
    sight = "sight"  # V1 multimodal on EfficientNet-Lite0


def config(kind: Kind, spec: BaseSpec) -> AdapterConfig:
    layers = tuple(range(min(2, spec.num_layers - 1), spec.num_layers))
    prompt = PromptConfig(length=10, layers=layers)
    if kind is Kind.v2:
        tuned = ScaleBiasConfig(scale="output", scale_targets=LINEARS, bias_targets=LINEARS)
        return AdapterConfig(base=spec, prompt=prompt, norms=True, scale_bias=tuned)
    if kind is Kind.v1:
        return AdapterConfig(base=spec, prompt=prompt)
    vision = VisionConfig(
        encoder="efficientnet-lite0",
        features="global",
        projector="mlp",
        fusion="add",
        layers=layers,
        num_tokens=1,
        feature_dim=1752,
        hidden_size=256,
        input_norm=True,
    )
    return AdapterConfig(base=spec, prompt=prompt, vision=vision)


def main(
    out: Annotated[Path, typer.Argument(help="folder to write into; each adapter a subfolder")],
    base: Annotated[str, typer.Option(help="id or path of the base")] = "smollm2-135m",
    kind: Annotated[Kind, typer.Option(help="what they tune")] = Kind.v1,
    count: Annotated[int, typer.Option(help="how many")] = 1,
) -> None:
    spec = base_spec(open_base(resolve_base(base, default_cache_dir())).config)
    for number in range(count):
        torch.manual_seed(number)
        adapter = Adapter(config(kind, spec))
        with torch.no_grad():
            for name, parameter in adapter.named_parameters():
                if name == "prompt":
                    parameter.mul_(0.05)  # like an embedding, so that text stays text
                elif name == "gate":
                    parameter.normal_(0, 0.05)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.001)
        save_adapter(adapter, out / f"{kind}-{number}")
    print(f"{count} adapters in {out}: llama-adapter serve --adapter-dir {out}")


if __name__ == "__main__":
    typer.run(main)

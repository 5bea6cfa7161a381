"""LLaMA-Adapter V1 files of the reference code: prompts of the top layers in one table, a gate per layer.

    adapter_query.weight             [P·K, C]       (cap_adapter_query.weight in the caption adapter)
    layers.{i}.attention.gate        [1, H, 1, 1]   in all layers; [1] in files of v.1.0.0's code

Neither K nor whether the gates pass through tanh is in an extracted file. The reference inference code
takes K = 10; training uses tanh, and the one released file is run without it (its issue 39). Gates begin at
0 and are trained in the layers that have prompts: they tell where an assumed K is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.adapter_config import AdapterConfig, BaseSpec, GateConfig, PromptConfig
from models.checkpoints.adapter_table import (
    AdapterOptions,
    Entry,
    NameTable,
    Unused,
    static_prompts,
    top_layers,
)
from models.checkpoints.reference import BASE_NORMS, BASE_WEIGHTS, gate_entry, ignored
from models.checkpoints.tensor_file import TensorFile
from models.checkpoints.torch_files import shown
from models.errors import CheckpointError

RELEASED = "llama_adapter_len10_layer30_release.pth"
GATE = "layers.{i}.attention.gate"
_DEFAULT_LENGTH = 10


@dataclass(frozen=True)
class ReferenceV1:
    """`query` is the prompt table's key; caption adapters have one of their own."""

    name: str = "reference-v1"
    query: str = "adapter_query.weight"
    template: str = "alpaca"
    options: frozenset[str] = frozenset({"gate", "length"})

    def matches(self, file: TensorFile) -> bool:
        return file.has(self.query) and file.has(GATE) and not file.has("visual_query.weight")

    def dimensions(self, file: TensorFile) -> dict[str, int]:
        layers = file.numbers(GATE)
        found = {"hidden_size": file.dim(self.query, 1, rank=2), "num_layers": layers[-1] + 1}
        gate = GATE.format(i=layers[-1])
        if file.tensor(gate).dim() > 1:
            found["num_heads"] = file.dim(gate, 1, rank=4)
        return found

    def config(self, file: TensorFile, base: BaseSpec, options: AdapterOptions) -> AdapterConfig:
        rows, said = file.dim(self.query, 0, rank=2), self._said_length(file, options)
        length = _DEFAULT_LENGTH if said is None else said
        count = rows // length
        if rows % length or count > base.num_layers:
            raise CheckpointError(
                f"{file.path}: {self.query} has {rows} rows, which are no whole number of prompts of "
                f"{length} rows in at most {base.num_layers} layers; say the prompts' length, "
                "such as length=10"
            )
        stated = file.args.get("adapter_layer")
        if isinstance(stated, int) and stated != count:
            raise CheckpointError(
                f"{file.path}: {self.query} has {rows} rows, prompts of {length} for {count} layers, and "
                f"args.adapter_layer is {stated}; say the prompts' length, such as length=10"
            )
        if said is None:
            self._check_gates(file, base.num_layers - count)
        return AdapterConfig(
            base=base,
            prompt=PromptConfig(length=length, layers=top_layers(base, count)),
            gate=GateConfig(
                per="layer" if file.tensor(GATE.format(i=base.num_layers - 1)).dim() == 1 else "head",
                activation=options.gate or ("raw" if file.path.name == RELEASED else "tanh"),
            ),
            template=self.template,
        )

    def table(self, config: AdapterConfig) -> NameTable:
        base, prompt = config.base, static_prompts(config)
        count, K, C = len(prompt.layers), prompt.length, base.hidden_size
        below = [i for i in range(base.num_layers) if i not in prompt.layers]
        gate = gate_entry(base, prompt.layers, config.gate.per, GATE)
        return NameTable(
            entries=(Entry("prompt", self.query, (count * K, C), (count, K, C)), gate),
            unused=tuple(Unused(GATE.format(i=i), gate.shape) for i in below),
            ignored=ignored(BASE_WEIGHTS, BASE_NORMS),
        )

    def unpack(self, file: TensorFile, config: AdapterConfig) -> TensorFile:
        return file

    def write(self, path: Path, config: AdapterConfig, tensors: dict[str, Tensor]) -> None:
        torch.save(tensors, path)

    def _said_length(self, file: TensorFile, options: AdapterOptions) -> int | None:
        said = file.args.get("adapter_len") if options.length is None else options.length
        if said is not None and not (isinstance(said, int) and 0 < said <= 1024):
            raise CheckpointError(
                f"{file.path}: args.adapter_len is {shown(said)}; say length=10 or what it is"
            )
        return said

    def _check_gates(self, file: TensorFile, first: int) -> None:
        """Raises CheckpointError where others than the layers from `first` on were trained."""
        layers = file.numbers(GATE)
        file.check_size(GATE.format(i=i) for i in layers)
        trained = [i for i in layers if file.tensor(GATE.format(i=i)).any()]
        if trained and trained[0] != first:
            raise CheckpointError(
                f"{file.path}: prompts of {_DEFAULT_LENGTH} rows would begin in layer {first}, and the gates "
                f"are trained from layer {trained[0]} on; say the prompts' length, as length=ROWS"
            )


REFERENCE_V1 = ReferenceV1()
REFERENCE_V1_CAPTION = ReferenceV1(
    name="reference-v1-caption", query="cap_adapter_query.weight", template="caption"
)

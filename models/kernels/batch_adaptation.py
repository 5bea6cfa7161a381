"""A step's tokens, each with the adapter in its slot of the bank, on a GPU: the vectors in Triton.

`models.adaptation` gathers a row for each token and then computes; here one kernel reads both.
"""

from __future__ import annotations

from torch import Tensor

from models.adaptation import BatchAdaptation
from models.adapter_config import LinearName
from models.functional import rms_norm
from models.kernels.slot_vectors import slot_rms_norm, slot_scale_bias
from models.llama import Head


class TritonBatchAdaptation(BatchAdaptation):
    def norm(self, layer: int, name: str, x_NC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
        weight_SC = self._stack(name, layer)
        if weight_SC is None:
            return rms_norm(x_NC, weight_C, eps)
        return slot_rms_norm(x_NC, weight_SC, self._slots_N, eps)

    def before(self, layer: int, name: LinearName, x: Tensor) -> Tensor:
        scale_SC = self._stack(f"scale_in.{name}", layer)
        return x if scale_SC is None else slot_scale_bias(x, scale_SC, None, self._slots_N)

    def after(self, layer: int, name: LinearName | Head, x: Tensor, y: Tensor) -> Tensor:
        scale_SC, bias_SC = (self._stack(f"{kind}.{name}", layer) for kind in ("scale_out", "bias"))
        if scale_SC is not None or bias_SC is not None:
            y = slot_scale_bias(y, scale_SC, bias_SC, self._slots_N)
        low = self.low_rank(layer, name, x)
        return y if low is None else y + low

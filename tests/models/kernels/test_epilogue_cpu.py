"""Outputs of a product go where they belong: whole panels by vectors, the last one number by number."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.kernels.epilogue_cpu import activate_outputs, add_outputs, put_outputs
from models.kernels.scalars_cpu import array, jit
from models.kernels.tile_cpu import PANEL, ROWS

WIDTHS = (1, PANEL - 1, PANEL, 2 * PANEL, 2 * PANEL + 17)
FIRST, ROWS_OF_ALL = 3, ROWS + 5


@jit
def put(y_RF, panel, out_NA):
    put_outputs(y_RF, FIRST, FIRST + ROWS, panel, out_NA)


@jit
def add(y_RF, panel, x_NC):
    add_outputs(y_RF, FIRST, FIRST + ROWS, panel, x_NC)


@jit
def activate(gate_RF, up_RF, panel, act_NI):
    activate_outputs(gate_RF, up_RF, FIRST, FIRST + ROWS, panel, act_NI)


def outputs(width: int, seed: int) -> np.ndarray:
    panels = -(-width // PANEL)
    return np.random.default_rng(seed).normal(0, 4, (panels, ROWS, PANEL)).astype(np.float32)


def expected(y_pRF: np.ndarray, width: int) -> torch.Tensor:
    """A tile's outputs side by side, zero in rows of other tiles."""
    wide = np.zeros((ROWS_OF_ALL, y_pRF.shape[0] * PANEL), np.float32)
    wide[FIRST : FIRST + ROWS] = np.concatenate(list(y_pRF), axis=1)
    return torch.from_numpy(wide[:, :width].copy())


@pytest.mark.parametrize("width", WIDTHS)
def test_outputs_are_put_and_added(width: int):
    y_pRF = outputs(width, 0)
    out_NA, x_NC = np.zeros((ROWS_OF_ALL, width), np.float32), np.ones((ROWS_OF_ALL, width), np.float32)
    for panel, y_RF in enumerate(y_pRF):
        put(y_RF, panel, out_NA)
        add(y_RF, panel, x_NC)
    wanted = expected(y_pRF, width)
    assert np.array_equal(out_NA, wanted.numpy())
    assert np.array_equal(x_NC, wanted.numpy() + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", WIDTHS)
def test_outputs_are_activated(width: int, dtype: torch.dtype):
    gate_pRF, up_pRF = outputs(width, 0), outputs(width, 1)
    gate_pRF[0, 0, 0], gate_pRF[0, 1, 0], gate_pRF[0, 0, -1] = -200.0, 200.0, 0.0  # where exp would not fit
    act_NI = torch.zeros(ROWS_OF_ALL, width, dtype=dtype)
    for panel in range(len(gate_pRF)):
        activate(gate_pRF[panel], up_pRF[panel], panel, array(act_NI))
    gate, up = expected(gate_pRF, width).double(), expected(up_pRF, width).double()
    wanted = gate * torch.sigmoid(gate) * up
    tolerance = 2e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(act_NI.double(), wanted, rtol=tolerance, atol=1e-30)


def test_what_is_no_number_stays_so():
    gate_RF, up_RF = outputs(PANEL, 0)[0], outputs(PANEL, 1)[0]
    gate_RF[1, 2] = np.nan
    act_NI = torch.zeros(ROWS_OF_ALL, PANEL, dtype=torch.bfloat16)
    activate(gate_RF, up_RF, 0, array(act_NI))
    assert act_NI.isnan().nonzero().tolist() == [[FIRST + 1, 2]]

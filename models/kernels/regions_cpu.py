"""The parallel regions of a layer on the CPU, compiled by numba.

Query, key and value, and likewise the head; rotation and the cache; attention's output; the feed-forward
block in two; norms. A product's tasks are panels of output features, which stay in the core's cache while
rows pass: all rows, or one of the `parts` that threads take of many. What adapters add, activations and the
residual sum are done while a panel's outputs are at hand.

Shapes: as in `models.kernels.layers_cpu`.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from models.kernels.entry_cpu import SERIAL_ROWS
from models.kernels.epilogue_cpu import activate_outputs, add_outputs, put_outputs
from models.kernels.inputs_cpu import inputs
from models.kernels.panel_cpu import add_and_scale, prefetch_panel
from models.kernels.product_cpu import outputs, tile_product
from models.kernels.rotation_cpu import rotate_head
from models.kernels.scalars_cpu import inlined_jit, jit, narrow, parallel_jit, widen
from models.kernels.tile_cpu import LANES, PANEL, ROWS


@jit
def norm(x_NC: Any, weight_SC: Any, slots_N: Any, eps: Any, h_NC: Any) -> None:
    """x / rms(x) ⊙ w[slot], as it is stored where `h_NC` is."""
    if x_NC.shape[0] <= SERIAL_ROWS:
        for n in range(x_NC.shape[0]):
            _norm_row(n, x_NC, weight_SC, slots_N, eps, h_NC)
    else:
        _norm_rows(x_NC, weight_SC, slots_N, eps, h_NC)


@parallel_jit
def _norm_rows(x_NC: Any, weight_SC: Any, slots_N: Any, eps: Any, h_NC: Any) -> None:
    for task in numba.prange(x_NC.shape[0]):
        _norm_row(np.int64(task), x_NC, weight_SC, slots_N, eps, h_NC)


@jit
def _norm_row(n: int, x_NC: Any, weight_SC: Any, slots_N: Any, eps: Any, h_NC: Any) -> None:
    C = x_NC.shape[1]
    squares = np.float32(0)
    for c in range(C):
        squares += x_NC[n, c] * x_NC[n, c]
    inverse = np.float32(1) / np.sqrt(squares / np.float32(C) + eps)
    slot = slots_N[n] if weight_SC.shape[0] > 1 else np.int64(0)
    for c in range(C):
        h_NC[n, c] = narrow(x_NC[n, c] * inverse * widen(weight_SC[slot, c]), h_NC[n, c])


@jit
def _linear(
    layer: int,
    x_NK: Any,
    groups_Ng2: Any,
    first: int,
    w_PKF: Any,
    panel: int,
    bias_LSA: Any,
    scale_LSA: Any,
    slots_N: Any,
    y_RF: Any,
) -> None:
    """y = s ⊙ (W h + b) of at most ROWS rows from `first` on, for one panel of the weight."""
    last = min(first + ROWS, x_NK.shape[0])
    prefetch_panel(bias_LSA, layer, panel, slots_N, first, last)
    prefetch_panel(scale_LSA, layer, panel, slots_N, first, last)
    tile_product(x_NK, groups_Ng2, first, last, w_PKF, panel, y_RF)
    if bias_LSA.shape[0] + scale_LSA.shape[0] > 0:
        add_and_scale(y_RF, bias_LSA, scale_LSA, layer, panel, slots_N, first, last)


@inlined_jit
def _part(i: int, parts: int, N: int) -> Any:
    """The i-th part's first row and its end: whole tiles of rows, so that none is cut."""
    tiles = (N + ROWS - 1) // ROWS
    return i * tiles // parts * ROWS, min((i + 1) * tiles // parts * ROWS, N)


@parallel_jit
def put(
    layer: int, parts: int, h_NC: Any, w_PKF: Any, bias_LSA: Any, scale_LSA: Any, slots_N: Any, y_NA: Any
) -> None:
    """y = s ⊙ (W h + b) in float32, as far as `y_NA` has features."""
    N = h_NC.shape[0]
    x, groups = inputs(h_NC, w_PKF)
    P = w_PKF.shape[0]
    for task in numba.prange(parts * P):
        p = np.int64(task) % P
        start, end = _part(np.int64(task) // P, parts, N)
        y_RF = outputs(w_PKF, p, end - start)
        for first in range(start, end, ROWS):
            last = min(first + ROWS, end)
            _linear(layer, x, groups, first, w_PKF, p, bias_LSA, scale_LSA, slots_N, y_RF)
            put_outputs(y_RF, first, last, p, y_NA)


@parallel_jit
def rotate(
    qkv_NA: Any, cos_ND: Any, sin_ND: Any, places_N: Any, q_NHD: Any, k_PsGD: Any, v_PsGD: Any
) -> None:
    """Queries to `q_NHD`, keys and values to their places in the cache, rotated but for the values."""
    N, (P, s, G, D) = q_NHD.shape[0], k_PsGD.shape
    k_TGD, v_TGD = k_PsGD.reshape(P * s, G, D), v_PsGD.reshape(P * s, G, D)
    if N <= SERIAL_ROWS:
        for n in range(N):
            _rotate_row(n, qkv_NA, cos_ND, sin_ND, places_N, q_NHD, k_TGD, v_TGD)
    else:
        for task in numba.prange(N):
            _rotate_row(np.int64(task), qkv_NA, cos_ND, sin_ND, places_N, q_NHD, k_TGD, v_TGD)


@jit
def _rotate_row(
    n: int, qkv_NA: Any, cos_ND: Any, sin_ND: Any, places_N: Any, q_NHD: Any, k_TGD: Any, v_TGD: Any
) -> None:
    H, D = q_NHD.shape[1], q_NHD.shape[2]
    G, place = k_TGD.shape[1], places_N[n]
    k_start = (H * D + PANEL - 1) // PANEL * PANEL
    v_start = k_start + (G * D + PANEL - 1) // PANEL * PANEL
    for h in range(H):
        _rotate_head(qkv_NA, n, h * D, cos_ND, sin_ND, q_NHD, n, h)
    for g in range(G):
        _rotate_head(qkv_NA, n, k_start + g * D, cos_ND, sin_ND, k_TGD, place, g)
        for d in range(D):
            v_TGD[place, g, d] = narrow(qkv_NA[n, v_start + g * D + d], v_TGD[place, g, d])


@inlined_jit
def _rotate_head(
    qkv_NA: Any, n: int, at: int, cos_ND: Any, sin_ND: Any, out_MHD: Any, m: int, h: int
) -> None:
    """Pairs are (i, i + D/2), as in `models.llama.rotate`."""
    half = out_MHD.shape[2] // 2
    if half % LANES == 0:
        rotate_head(qkv_NA, n, at, cos_ND, sin_ND, out_MHD, m, h)
    else:
        for d in range(half):
            a, b = qkv_NA[n, at + d], qkv_NA[n, at + half + d]
            cos, sin = cos_ND[n, d], sin_ND[n, d]
            out_MHD[m, h, d] = narrow(a * cos - b * sin, out_MHD[m, h, d])
            out_MHD[m, h, half + d] = narrow(b * cos + a * sin, out_MHD[m, h, d])


@parallel_jit
def add(
    layer: int, parts: int, h_NK: Any, w_PKF: Any, bias_LSA: Any, scale_LSA: Any, slots_N: Any, x_NC: Any
) -> None:
    """x += s ⊙ (W h + b)."""
    N = x_NC.shape[0]
    x, groups = inputs(h_NK, w_PKF)
    P = w_PKF.shape[0]
    for task in numba.prange(parts * P):
        p = np.int64(task) % P
        start, end = _part(np.int64(task) // P, parts, N)
        y_RF = outputs(w_PKF, p, end - start)
        for first in range(start, end, ROWS):
            last = min(first + ROWS, end)
            _linear(layer, x, groups, first, w_PKF, p, bias_LSA, scale_LSA, slots_N, y_RF)
            add_outputs(y_RF, first, last, p, x_NC)


@parallel_jit
def gate_up(
    layer: int, parts: int, h_NC: Any, w_PKF: Any, bias_LSA: Any, scale_LSA: Any, slots_N: Any, act_NI: Any
) -> None:
    """silu(W1 h) ⊙ W3 h; the panels of w1 are the first half."""
    N = act_NI.shape[0]
    half = w_PKF.shape[0] // 2
    x, groups = inputs(h_NC, w_PKF)
    for task in numba.prange(parts * half):
        p = np.int64(task) % half
        start, end = _part(np.int64(task) // half, parts, N)
        gate_RF, up_RF = outputs(w_PKF, p, end - start), outputs(w_PKF, half + p, end - start)
        for first in range(start, end, ROWS):
            last = min(first + ROWS, end)
            _linear(layer, x, groups, first, w_PKF, p, bias_LSA, scale_LSA, slots_N, gate_RF)
            _linear(layer, x, groups, first, w_PKF, half + p, bias_LSA, scale_LSA, slots_N, up_RF)
            activate_outputs(gate_RF, up_RF, first, last, p, act_NI)

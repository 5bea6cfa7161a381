"""A step on the CPU, from tokens to logits, compiled by numba: one call.

What `models.llama` says in torch, in five parallel regions a layer: query, key and value; rotation and the
cache; attention; its output; the feed-forward block in two. A region's tasks are panels of output features,
which stay in the core's cache while all rows pass; what adapters add, activations and the residual sum are
done while a panel's outputs are at hand. A row's numbers do not depend on the other rows, to the last bit.

Shapes: N rows, M of which want logits, L layers, C hidden size, I feed-forward size, V vocabulary, H query
heads, G key/value heads, D head size, B sequences, S slots of the adapter bank, A features of query, key and
value together, each filled up to whole panels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np

from models.kernels.entry_cpu import SERIAL_ROWS, enter
from models.kernels.epilogue_cpu import activate_outputs, add_outputs, put_outputs
from models.kernels.paged_cpu import attend
from models.kernels.panel_cpu import add_and_scale, prefetch_panel
from models.kernels.product_cpu import group_sums, outputs, tile_product
from models.kernels.rotation_cpu import rotate_head
from models.kernels.scalars_cpu import inlined_jit, jit, narrow, parallel_jit, widen
from models.kernels.tile_cpu import LANES, PANEL, ROWS


class Weights(NamedTuple):
    """The base's; linears packed (`models.kernels.linear_cpu`), and those of layers stacked over them."""

    embed_VC: Any
    qkv_LPKF: Any
    wo_LPKF: Any
    gate_up_LPKF: Any
    w2_LPKF: Any
    head_PKF: Any
    frequencies_D: Any  # [D / 2], float64
    eps: Any  # of the norms, float32


class Vectors(NamedTuple):
    """What the batch's adapters put in place of norms, or add; slots of the bank side by side.

    Biases and scales in the order qkv, wo, gate_up, w2, head, [L, S, A], as in `models.kernels.panel_bank`;
    without layers: none. Norms have a single slot where all rows have the base's.
    """

    attention_norm_LSC: Any
    feed_forward_norm_LSC: Any
    final_norm_SC: Any
    bias: tuple[Any, ...]
    scale: tuple[Any, ...]


class Batch(NamedTuple):
    """Sequence b has the rows `starts[b]:starts[b + 1]`, which are the last of its `lens_B[b]` positions."""

    tokens_N: Any
    starts: Any  # [B + 1]
    lens_B: Any
    blocks_BM: Any
    prompt_slots_B: Any
    slots_B: Any  # of the adapter bank
    rows_M: Any  # which want logits


class Cache(NamedTuple):
    """Of tokens and of prompts, all layers."""

    k_LPsGD: Any
    v_LPsGD: Any
    prompt_k_LSKGD: Any
    prompt_v_LSKGD: Any
    prompt_lens_LS: Any
    gate_LSH: Any


class Rows(NamedTuple):
    """The step's rows on their way: first what `entry_cpu.enter` fills, then what each layer makes anew."""

    sequences_N: Any
    lens_N: Any  # positions that a row sees
    places_N: Any  # flat cache positions
    slots_N: Any  # of the adapter bank
    cos_ND: Any  # [N, D / 2], as sin
    sin_ND: Any
    x_NC: Any  # float32, the residual stream
    h_NC: Any
    qkv_NA: Any  # float32
    q_NHD: Any
    out_NHD: Any
    act_NI: Any


@jit
def run(w: Any, vectors: Any, batch: Any, cache: Any, rows: Any, logits_MV: Any) -> None:
    """New keys and values go to the cache, and logits in float32 to `logits_MV`."""
    enter(w.embed_VC, w.frequencies_D, batch, rows, cache.k_LPsGD.shape[2])
    _run_layers(w, vectors, batch, cache, rows)
    if logits_MV.shape[0] > 0:
        _head(w, vectors, rows, batch.rows_M, logits_MV)


@jit
def _run_layers(w: Any, vectors: Any, batch: Any, cache: Any, rows: Any) -> None:
    """The residual stream through all layers, in place."""
    N = rows.x_NC.shape[0]
    flat_NC = rows.out_NHD.reshape(N, rows.out_NHD.shape[1] * rows.out_NHD.shape[2])
    bias, scale, slots_N = vectors.bias, vectors.scale, rows.slots_N
    for layer in range(w.qkv_LPKF.shape[0]):
        norm(rows.x_NC, vectors.attention_norm_LSC[layer], slots_N, w.eps, rows.h_NC)
        _qkv(layer, rows.h_NC, w.qkv_LPKF[layer], bias[0], scale[0], slots_N, rows.qkv_NA)
        k_PsGD, v_PsGD = cache.k_LPsGD[layer], cache.v_LPsGD[layer]
        _rotate(rows.qkv_NA, rows.cos_ND, rows.sin_ND, rows.places_N, rows.q_NHD, k_PsGD, v_PsGD)
        attend(
            rows.q_NHD,
            k_PsGD,
            v_PsGD,
            batch.blocks_BM,
            rows.sequences_N,
            rows.lens_N,
            cache.prompt_k_LSKGD[layer],
            cache.prompt_v_LSKGD[layer],
            batch.prompt_slots_B,
            cache.prompt_lens_LS[layer],
            cache.gate_LSH[layer],
            rows.out_NHD,
        )
        _add(layer, flat_NC, w.wo_LPKF[layer], bias[1], scale[1], slots_N, rows.x_NC)
        norm(rows.x_NC, vectors.feed_forward_norm_LSC[layer], slots_N, w.eps, rows.h_NC)
        _gate_up(layer, rows.h_NC, w.gate_up_LPKF[layer], bias[2], scale[2], slots_N, rows.act_NI)
        _add(layer, rows.act_NI, w.w2_LPKF[layer], bias[3], scale[3], slots_N, rows.x_NC)


@jit
def _head(w: Any, vectors: Any, rows: Any, rows_M: Any, logits_MV: Any) -> None:
    """Of the rows wanted, which move to the front of `x_NC` and `h_NC`."""
    M = rows_M.shape[0]
    for m in range(M):
        n = rows_M[m]
        rows.slots_N[m] = rows.slots_N[n]
        for c in range(rows.x_NC.shape[1]):
            rows.x_NC[m, c] = rows.x_NC[n, c]
    x_MC, h_MC, slots_M = rows.x_NC[:M], rows.h_NC[:M], rows.slots_N[:M]
    norm(x_MC, vectors.final_norm_SC, slots_M, w.eps, h_MC)
    _logits(h_MC, w.head_PKF, vectors.bias[4], vectors.scale[4], slots_M, logits_MV)


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
    h_NK: Any,
    sums_Ng: Any,
    first: int,
    w_PKF: Any,
    panel: int,
    bias_LSA: Any,
    scale_LSA: Any,
    slots_N: Any,
    y_RF: Any,
) -> None:
    """y = s ⊙ (W h + b) of at most ROWS rows from `first` on, for one panel of the weight."""
    last = min(first + ROWS, h_NK.shape[0])
    prefetch_panel(bias_LSA, layer, panel, slots_N, first, last)
    prefetch_panel(scale_LSA, layer, panel, slots_N, first, last)
    tile_product(h_NK, sums_Ng, first, last, w_PKF, panel, y_RF)
    if bias_LSA.shape[0] + scale_LSA.shape[0] > 0:
        add_and_scale(y_RF, bias_LSA, scale_LSA, layer, panel, slots_N, first, last)


@parallel_jit
def _qkv(layer: int, h_NC: Any, w_PKF: Any, bias_LSA: Any, scale_LSA: Any, slots_N: Any, qkv_NA: Any) -> None:
    N = h_NC.shape[0]
    sums = group_sums(h_NC, w_PKF)
    for task in numba.prange(w_PKF.shape[0]):
        p = np.int64(task)
        y_RF = outputs(w_PKF, p, N)
        for first in range(0, N, ROWS):
            last = min(first + ROWS, N)
            _linear(layer, h_NC, sums, first, w_PKF, p, bias_LSA, scale_LSA, slots_N, y_RF)
            put_outputs(y_RF, first, last, p, qkv_NA)


@parallel_jit
def _rotate(
    qkv_NA: Any, cos_ND: Any, sin_ND: Any, places_N: Any, q_NHD: Any, k_PsGD: Any, v_PsGD: Any
) -> None:
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
def _add(layer: int, h_NK: Any, w_PKF: Any, bias_LSA: Any, scale_LSA: Any, slots_N: Any, x_NC: Any) -> None:
    """x += s ⊙ (W h + b)."""
    N = x_NC.shape[0]
    sums = group_sums(h_NK, w_PKF)
    for task in numba.prange(w_PKF.shape[0]):
        p = np.int64(task)
        y_RF = outputs(w_PKF, p, N)
        for first in range(0, N, ROWS):
            last = min(first + ROWS, N)
            _linear(layer, h_NK, sums, first, w_PKF, p, bias_LSA, scale_LSA, slots_N, y_RF)
            add_outputs(y_RF, first, last, p, x_NC)


@parallel_jit
def _gate_up(
    layer: int, h_NC: Any, w_PKF: Any, bias_LSA: Any, scale_LSA: Any, slots_N: Any, act_NI: Any
) -> None:
    """silu(W1 h) ⊙ W3 h; the panels of w1 are the first half."""
    N = act_NI.shape[0]
    half = w_PKF.shape[0] // 2
    sums = group_sums(h_NC, w_PKF)
    for task in numba.prange(half):
        p = np.int64(task)
        gate_RF, up_RF = outputs(w_PKF, p, N), outputs(w_PKF, half + p, N)
        for first in range(0, N, ROWS):
            last = min(first + ROWS, N)
            _linear(layer, h_NC, sums, first, w_PKF, p, bias_LSA, scale_LSA, slots_N, gate_RF)
            _linear(layer, h_NC, sums, first, w_PKF, half + p, bias_LSA, scale_LSA, slots_N, up_RF)
            activate_outputs(gate_RF, up_RF, first, last, p, act_NI)


@parallel_jit
def _logits(h_MC: Any, w_PKF: Any, bias_LSA: Any, scale_LSA: Any, slots_M: Any, logits_MV: Any) -> None:
    """s ⊙ (W h + b)."""
    M = logits_MV.shape[0]
    sums = group_sums(h_MC, w_PKF)
    for task in numba.prange(w_PKF.shape[0]):
        p = np.int64(task)
        y_RF = outputs(w_PKF, p, M)
        for first in range(0, M, ROWS):
            last = min(first + ROWS, M)
            _linear(0, h_MC, sums, first, w_PKF, p, bias_LSA, scale_LSA, slots_M, y_RF)
            put_outputs(y_RF, first, last, p, logits_MV)

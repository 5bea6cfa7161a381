"""A step on the CPU, from tokens to logits, compiled by numba: one call.

What `models.llama` says in torch, by the parallel regions of `models.kernels.regions_cpu` and attention. A
row's numbers do not depend on the other rows, to the last bit. In long steps a thread has the same run of
rows in every region: cores that share no cache would else wait for each other's results in each. A prompt's
later rows see more, so `entry_cpu` deals them out.

Shapes: N rows, M of which want logits, L layers, C hidden size, I feed-forward size, V vocabulary, H query
heads, G key/value heads, D head size, B sequences, S slots of the adapter bank, A features of query, key and
value together, each filled up to whole panels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from models.kernels.entry_cpu import enter
from models.kernels.paged_cpu import attend
from models.kernels.regions_cpu import add, gate_up, norm, put, rotate
from models.kernels.scalars_cpu import jit, merged_jit

PART_ROWS = 256  # at least, where each thread has its own: all weights pass its cache for them


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
    num_threads: int


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

    at_N: Any  # of the batch's n-th token
    tokens_N: Any
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
    rows = _run_layers(w, vectors, batch, cache, rows)
    if logits_MV.shape[0] > 0:
        norm(rows.x_NC, vectors.final_norm_SC, rows.slots_N, w.eps, rows.h_NC)
        first, whole = np.int64(0), np.int64(1)  # constants would have it compiled once more, for them
        put(first, whole, rows.h_NC, w.head_PKF, vectors.bias[4], vectors.scale[4], rows.slots_N, logits_MV)


@merged_jit
def _run_layers(w: Any, vectors: Any, batch: Any, cache: Any, rows: Any) -> Any:
    """The residual stream through all layers, in place; the rows that want logits are returned.

    Of the others nothing but keys and values is needed in the last layer.
    """
    bias, scale, last = vectors.bias, vectors.scale, w.qkv_LPKF.shape[0] - 1
    for layer in range(last + 1):
        parts = max(1, min(batch.num_threads, rows.x_NC.shape[0] // PART_ROWS))
        norm(rows.x_NC, vectors.attention_norm_LSC[layer], rows.slots_N, w.eps, rows.h_NC)
        put(layer, parts, rows.h_NC, w.qkv_LPKF[layer], bias[0], scale[0], rows.slots_N, rows.qkv_NA)
        k_PsGD, v_PsGD = cache.k_LPsGD[layer], cache.v_LPsGD[layer]
        rotate(rows.qkv_NA, rows.cos_ND, rows.sin_ND, rows.places_N, rows.q_NHD, k_PsGD, v_PsGD)
        if layer == last:
            rows, parts = _only(rows, batch.rows_M), 1
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
            layer == last,  # those that want logits are in order again
        )
        N, H, D = rows.out_NHD.shape
        flat_NC = rows.out_NHD.reshape(N, H * D)
        add(layer, parts, flat_NC, w.wo_LPKF[layer], bias[1], scale[1], rows.slots_N, rows.x_NC)
        norm(rows.x_NC, vectors.feed_forward_norm_LSC[layer], rows.slots_N, w.eps, rows.h_NC)
        gate_up(layer, parts, rows.h_NC, w.gate_up_LPKF[layer], bias[2], scale[2], rows.slots_N, rows.act_NI)
        add(layer, parts, rows.act_NI, w.w2_LPKF[layer], bias[3], scale[3], rows.slots_N, rows.x_NC)
    return rows


@merged_jit
def _only(rows: Any, rows_M: Any) -> Any:
    """The rows of these tokens, as far as they are needed from attention on."""
    M = rows_M.shape[0]
    sequences_M, lens_M, slots_M = np.empty(M, np.int64), np.empty(M, np.int64), np.empty(M, np.int64)
    _, H, D = rows.q_NHD.shape
    x_MC = np.empty((M, rows.x_NC.shape[1]), rows.x_NC.dtype)
    q_MHD = np.empty((M, H, D), rows.q_NHD.dtype)
    for m in range(M):
        n = rows.at_N[rows_M[m]]
        sequences_M[m], lens_M[m], slots_M[m] = rows.sequences_N[n], rows.lens_N[n], rows.slots_N[n]
        x_MC[m], q_MHD[m] = rows.x_NC[n], rows.q_NHD[n]
    return Rows(
        rows.at_N[:M],
        rows.tokens_N[:M],
        sequences_M,
        lens_M,
        rows.places_N[:M],
        slots_M,
        rows.cos_ND[:M],
        rows.sin_ND[:M],
        x_MC,
        rows.h_NC[:M],
        rows.qkv_NA[:M],
        q_MHD,
        rows.out_NHD[:M],
        rows.act_NI[:M],
    )

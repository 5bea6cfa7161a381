"""Random inputs of the GPU's kernels, and what they must give: for `kernels.py` and for the tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.attention import causal_attention, prompt_attention


@dataclass(frozen=True)
class PagedCase:
    """Sequences whose last `new[b]` of `lens[b]` positions are queries, and the prompts that they see.

    Every field is an argument of the kernels. Blocks lie anywhere; what no sequence owns holds NaN, so
    that reading it shows. The shapes' letters are those of `models/kernels/paged_decode.py`.
    """

    q_NHD: Tensor
    k_PsGD: Tensor
    v_PsGD: Tensor
    blocks_BM: Tensor
    starts: Tensor
    lens_B: Tensor
    prompt_k_SKGD: Tensor
    prompt_v_SKGD: Tensor
    slots_B: Tensor
    prompt_lens_S: Tensor
    gate_SH: Tensor

    @classmethod
    def random(
        cls,
        lens: Sequence[int],
        new: Sequence[int],
        prompt_lens: Sequence[int],
        slots: Sequence[int],
        *,
        heads: tuple[int, int],
        head_dim: int,
        dtype: torch.dtype,
        page: int = 16,
        device: str = "cpu",
        seed: int = 0,
    ) -> PagedCase:
        """`heads` are those of queries and of keys."""
        generator = torch.Generator(device).manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        def integers(values: Sequence[int] | Tensor) -> Tensor:
            return torch.as_tensor(values, dtype=torch.int32).to(device)

        (H, G), D, S, K = heads, head_dim, len(prompt_lens), max(prompt_lens)
        counts = [-(-length // page) for length in lens]
        P = sum(counts) + 1
        order = torch.randperm(P, generator=torch.Generator().manual_seed(seed)).split([*counts, 1])
        blocks_BM = torch.zeros(len(lens), max(counts), dtype=torch.int32)
        k_PsGD, v_PsGD = randn(P, page, G, D), randn(P, page, G, D)
        for b, (own, length) in enumerate(zip(order, lens, strict=False)):
            blocks_BM[b, : len(own)] = own
            if length % page:
                k_PsGD[own[-1], length % page :] = v_PsGD[own[-1], length % page :] = torch.nan
        k_PsGD[order[-1]] = v_PsGD[order[-1]] = torch.nan
        prompt_k, prompt_v = randn(S, K, G, D), randn(S, K, G, D)
        for slot, rows in enumerate(prompt_lens):
            prompt_k[slot, rows:] = prompt_v[slot, rows:] = torch.nan
        starts = torch.tensor([0, *new]).cumsum(0)
        return cls(
            randn(sum(new), H, D),
            k_PsGD,
            v_PsGD,
            integers(blocks_BM),
            integers(starts),
            integers(lens),
            prompt_k,
            prompt_v,
            integers(slots),
            integers(prompt_lens),
            torch.randn(S, H, generator=generator, device=device),
        )

    def plain(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The formula of `models.attention`, sequence by sequence; [N, H, D]."""
        rows, starts = [], self.starts.tolist()
        for b, (length, slot) in enumerate(zip(self.lens_B.tolist(), self.slots_B.tolist(), strict=True)):
            q_THD = self.q_NHD[starts[b] : starts[b + 1]].to(dtype)
            own = self.blocks_BM[b].long()
            k_UGD, v_UGD = (x[own].flatten(0, 1)[:length].to(dtype) for x in (self.k_PsGD, self.v_PsGD))
            out_THD = causal_attention(q_THD, k_UGD, v_UGD) if length else torch.zeros_like(q_THD)
            K = int(self.prompt_lens_S[slot])
            k_1KGD, v_1KGD = (x[slot, None, :K].to(dtype) for x in (self.prompt_k_SKGD, self.prompt_v_SKGD))
            gate_1H = self.gate_SH[slot, None].to(dtype)
            rows.append(out_THD + prompt_attention(q_THD[None], k_1KGD, v_1KGD, None, gate_1H)[0])
        return torch.cat(rows)


@dataclass(frozen=True)
class PackedCase:
    """Whole sequences one after another, as a training pass has them, and a prompt slot for each."""

    q_NHD: Tensor
    k_NGD: Tensor
    v_NGD: Tensor
    prompt_k_SKGD: Tensor
    prompt_v_SKGD: Tensor
    gate_SH: Tensor
    prompt_lens_S: Tensor
    lens_B: tuple[int, ...]
    slots_B: Tensor

    @classmethod
    def random(
        cls,
        lens: Sequence[int],
        prompt_lens: Sequence[int],
        slots: Sequence[int],
        *,
        heads: tuple[int, int],
        head_dim: int,
        dtype: torch.dtype,
        device: str = "cpu",
        seed: int = 0,
    ) -> PackedCase:
        """`heads` are those of queries and of keys."""
        generator = torch.Generator(device).manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        (H, G), D, N, S, K = heads, head_dim, sum(lens), len(prompt_lens), max(prompt_lens)
        return cls(
            randn(N, H, D),
            randn(N, G, D),
            randn(N, G, D),
            randn(S, K, G, D),
            randn(S, K, G, D),
            torch.randn(S, H, generator=generator, device=device),
            torch.tensor(prompt_lens, dtype=torch.int32, device=device),
            tuple(lens),
            torch.tensor(slots, device=device),
        )

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What has a gradient."""
        return (
            self.q_NHD,
            self.k_NGD,
            self.v_NGD,
            self.prompt_k_SKGD,
            self.prompt_v_SKGD,
            self.gate_SH,
        )

    def plain(
        self, q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, gate: Tensor
    ) -> Tensor:
        """The formula of `models.attention`, sequence by sequence, of these leaves; [N, H, D]."""
        rows = []
        parts = zip(q.split(self.lens_B), k.split(self.lens_B), v.split(self.lens_B), strict=True)
        for slot, (q_THD, k_TGD, v_TGD) in zip(self.slots_B.tolist(), parts, strict=True):
            K = int(self.prompt_lens_S[slot])
            prompted_1THD = prompt_attention(
                q_THD[None], prompt_k[slot, None, :K], prompt_v[slot, None, :K], None, gate[slot, None]
            )
            rows.append(causal_attention(q_THD, k_TGD, v_TGD) + prompted_1THD[0])
        return torch.cat(rows)

    def unfused(
        self, q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, gate: Tensor
    ) -> Tensor:
        """The formula at once, where all sequences are of one length and see one slot."""
        B, slots = len(self.lens_B), self.slots_B
        q_BTHD, k_BTGD, v_BTGD = (x.unflatten(0, (B, -1)) for x in (q, k, v))
        prompted = prompt_attention(q_BTHD, prompt_k[slots], prompt_v[slots], None, gate[slots])
        return (_causal(q_BTHD, k_BTGD, v_BTGD) + prompted).flatten(0, 1)


def unfused(
    q_NHD: Tensor,
    k_PsGD: Tensor,
    v_PsGD: Tensor,
    blocks_BM: Tensor,
    length: int,
    prompt_k_SKGD: Tensor,
    prompt_v_SKGD: Tensor,
    slots_B: Tensor,
    prompt_lens_S: Tensor,
    gate_SH: Tensor,
) -> Tensor:
    """Paged attention by the formula at once, where all sequences are of one length and have chunks alike.

    What plain torch does: gathers the cache, writes all scores, and reads them again for each step.
    """
    q_BTHD = q_NHD.unflatten(0, (len(blocks_BM), -1))
    k_BUGD, v_BUGD = (x[blocks_BM].flatten(1, 2)[:, :length] for x in (k_PsGD, v_PsGD))
    slots_B = slots_B.long()
    prompted = prompt_attention(
        q_BTHD, prompt_k_SKGD[slots_B], prompt_v_SKGD[slots_B], prompt_lens_S[slots_B], gate_SH[slots_B]
    )
    return (_causal(q_BTHD, k_BUGD, v_BUGD) + prompted).flatten(0, 1)


def _causal(q_BTHD: Tensor, k_BUGD: Tensor, v_BUGD: Tensor) -> Tensor:
    """softmax(q·kᵀ/√D)·v of the last T of U positions, softmax in float32; [B, T, H, D]."""
    q_BHTD, k_BGUD, v_BGUD = (x.transpose(1, 2) for x in (q_BTHD, k_BUGD, v_BUGD))
    (H, T, D), (G, U) = q_BHTD.shape[1:], k_BGUD.shape[1:3]
    q_BGMD = q_BHTD.unflatten(1, (G, H // G)).flatten(2, 3)
    scores_BGRTU = (q_BGMD @ k_BGUD.mT).float().mul(D**-0.5).unflatten(2, (-1, T))
    if T > 1:
        future = torch.ones(T, U, dtype=torch.bool, device=q_BTHD.device).triu(U - T + 1)
        scores_BGRTU = scores_BGRTU.masked_fill(future, float("-inf"))
    p_BGMU = scores_BGRTU.softmax(-1).to(v_BGUD.dtype).flatten(2, 3)
    out_BHTD = (p_BGMU @ v_BGUD).unflatten(2, (-1, T)).flatten(1, 2)
    return out_BHTD.transpose(1, 2)

"""The compiled kernels on a GPU, at the sizes of real models; the other tests here run on it too, if there
is one."""

import pytest
import torch

from bench.kernel_cases import PackedCase, PagedCase
from models.kernels.packed import Packing, packed_attention
from models.kernels.paged_decode import paged_decode
from models.kernels.paged_prefill import paged_prefill

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no CUDA device: kernels run in the interpreter"
    ),
]

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-4}
HEADS = [(32, 32), (32, 8), (9, 3)]  # LLaMA-7B, Llama-3-8B, SmolLM2-135M
LENS = (1, 17, 4000, 1025, 300)
PROMPT_LENS = (0, 1, 10, 20)
SLOTS = (0, 1, 2, 3, 2)


def cases(new: tuple[int, ...], heads: tuple[int, int], dtype: torch.dtype) -> PagedCase:
    head_dim = 64 if heads[0] == 9 else 128
    return PagedCase.random(
        LENS, new, PROMPT_LENS, SLOTS, heads=heads, head_dim=head_dim, dtype=dtype, device="cuda"
    )


def decode(c: PagedCase) -> torch.Tensor:
    prompts = (c.prompt_k_SKGD, c.prompt_v_SKGD, c.slots_B, c.prompt_lens_S, c.gate_SH)
    return paged_decode(c.q_NHD, c.k_PsGD, c.v_PsGD, c.blocks_BM, c.lens_B, *prompts)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads", HEADS)
def test_decode(heads: tuple[int, int], dtype: torch.dtype):
    case = cases((1,) * 5, heads, dtype)
    torch.testing.assert_close(
        decode(case).double(), case.plain(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
    )


def test_decode_in_a_graph():
    """A captured launch reads what lies in its inputs then, and waits for nothing."""
    case = cases((1,) * 5, HEADS[0], torch.bfloat16)
    expected = decode(case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode(case)
    case.q_NHD.neg_()
    graph.replay()
    assert not torch.equal(out, expected)
    assert torch.equal(out, decode(case))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads", HEADS)
def test_prefill(heads: tuple[int, int], dtype: torch.dtype):
    c = cases((1, 17, 512, 1000, 3), heads, dtype)
    prompts = (c.prompt_k_SKGD, c.prompt_v_SKGD, c.slots_B, c.prompt_lens_S, c.gate_SH)
    out = paged_prefill(c.q_NHD, c.k_PsGD, c.v_PsGD, c.blocks_BM, c.starts, c.lens_B, 1000, *prompts)
    torch.testing.assert_close(out.double(), c.plain(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads", HEADS)
def test_training(heads: tuple[int, int], dtype: torch.dtype):
    """Gradients against those in float64, by the largest of each; and the same bits twice."""
    head_dim = 64 if heads[0] == 9 else 128
    case = PackedCase.random(
        (513, 1, 200), PROMPT_LENS, (3, 1, 3), heads=heads, head_dim=head_dim, dtype=dtype, device="cuda"
    )
    weight = torch.randn(case.q_NHD.shape, device="cuda").to(dtype)
    packing = Packing.of(case.lens_B, case.slots_B, case.q_NHD.device)

    def gradients() -> tuple[torch.Tensor, ...]:
        mine = [x.clone().requires_grad_() for x in case.leaves]
        out = packed_attention(*mine[:5], case.prompt_lens_S, mine[5], packing)
        return torch.autograd.grad((out * weight).sum(), mine)

    exact = [x.double().requires_grad_() for x in case.leaves]
    wanted = torch.autograd.grad((case.plain(*exact) * weight.double()).sum(), exact)
    first, second = gradients(), gradients()
    for one, two, y in zip(first, second, wanted, strict=True):
        assert torch.equal(one, two)
        assert (one.double() - y).abs().max() <= 2 * TOLERANCE[dtype] * max(1.0, float(y.abs().max()))

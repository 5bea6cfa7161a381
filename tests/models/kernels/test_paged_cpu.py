"""The CPU's attention against the formula in float64: chunks and decodes, contexts, prompts, groups."""

import itertools
from dataclasses import replace

import pytest
import torch

from bench.kernel_cases import PagedCase
from models.kernels.paged_cpu import paged_attend
from models.kv_cache import StepLayout

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
NEW = (1, 1, 1, 7, 40, 5)
LENS = (1, 23, 75, 7, 75, 101)  # no context; and contexts and chunks that end mid-page
PROMPT_LENS = (0, 1, 10, 20)
SLOTS = (0, 3, 2, 1, 3, 2)


def attend(case: PagedCase) -> torch.Tensor:
    layout = StepLayout(
        num_single=0,
        starts=case.starts.tolist(),
        lens_B=case.lens_B.numpy(),
        blocks_BM=case.blocks_BM.numpy(),
        prompt_slots_B=case.slots_B.numpy(),
        block_size=case.k_PsGD.shape[1],
    )
    return paged_attend(
        case.q_NHD,
        case.k_PsGD,
        case.v_PsGD,
        layout.blocks_BM,
        layout.sequences_N,
        layout.lens_N,
        case.prompt_k_SKGD,
        case.prompt_v_SKGD,
        layout.prompt_slots_B,
        case.prompt_lens_S.numpy(),
        case.gate_SH.numpy(),
    )


def random_case(lens=LENS, new=NEW, prompt_lens=PROMPT_LENS, slots=SLOTS, **changes) -> PagedCase:
    options = {"heads": (3, 1), "head_dim": 64, "dtype": torch.float32} | changes
    return PagedCase.random(lens, new, prompt_lens, slots, **options)


def assert_plain(case: PagedCase) -> None:
    out = attend(case)
    assert out.dtype == case.q_NHD.dtype
    tolerance = TOLERANCE[out.dtype]
    torch.testing.assert_close(out.double(), case.plain(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("heads", [(2, 2), (3, 1), (7, 1), (8, 2)])
def test_groups_of_heads(heads: tuple[int, int]):
    assert_plain(random_case(heads=heads))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("head_dim", [64, 128, 192, 24])
def test_precisions_and_head_sizes(head_dim: int, dtype: torch.dtype):
    assert_plain(random_case(head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("heads", [(3, 1), (4, 4)])
def test_a_single_row(heads: tuple[int, int]):
    """So few tasks that each head is one."""
    assert_plain(random_case(lens=(37,), new=(1,), slots=(2,), heads=heads))


@pytest.mark.parametrize("page", [1, 4, 48])
def test_pages_of_any_size(page: int):
    assert_plain(random_case(page=page))


def test_without_any_prompts():
    assert_plain(random_case(prompt_lens=(0,), slots=(0,) * len(LENS)))


def test_a_row_does_not_depend_on_the_others():
    case = random_case(heads=(9, 3), dtype=torch.bfloat16)
    alone = random_case(lens=LENS[:2], new=NEW[:2], slots=SLOTS[:2], heads=(9, 3), dtype=torch.bfloat16)
    for name in ("k_PsGD", "v_PsGD", "prompt_k_SKGD", "prompt_v_SKGD", "prompt_lens_S", "gate_SH"):
        vars(alone)[name] = getattr(case, name)
    vars(alone)["blocks_BM"] = case.blocks_BM[:2].clone()
    vars(alone)["q_NHD"] = case.q_NHD[:2].clone()
    assert torch.equal(attend(alone), attend(case)[:2])


def each_alone(case: PagedCase) -> torch.Tensor:
    """Every row as a decode by itself."""
    starts, rows = case.starts.tolist(), []
    for b, (first, last) in enumerate(itertools.pairwise(starts)):
        for n in range(first, last):
            length = case.lens_B[b : b + 1] - (last - 1 - n)
            own = {"blocks_BM": case.blocks_BM[b : b + 1], "slots_B": case.slots_B[b : b + 1]}
            own |= {"q_NHD": case.q_NHD[n : n + 1], "starts": torch.tensor([0, 1]), "lens_B": length}
            rows.append(attend(replace(case, **own)))
    return torch.cat(rows)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("heads", [(3, 3), (2, 1), (9, 3), (8, 2), (5, 1), (6, 1), (7, 1), (8, 1)])
def test_a_chunk_equals_its_rows_alone(heads: tuple[int, int], head_dim: int, dtype: torch.dtype):
    new = tuple(range(1, 21))
    lens = tuple(count + 3 * i for i, count in enumerate(new))
    slots = tuple(i % len(PROMPT_LENS) for i in new)
    case = random_case(lens=lens, new=new, slots=slots, heads=heads, head_dim=head_dim, dtype=dtype)
    assert_plain(case)
    assert torch.equal(attend(case), each_alone(case))


@pytest.mark.parametrize("page", [1, 4, 24, 48])
def test_a_chunk_equals_its_rows_alone_with_pages_of_any_size(page: int):
    case = random_case(heads=(9, 3), dtype=torch.bfloat16, page=page)
    assert torch.equal(attend(case), each_alone(case))


def test_scores_beyond_the_range_of_exp():
    case = random_case()
    case.q_NHD.mul_(1e3)
    torch.testing.assert_close(attend(case).double(), case.plain(), atol=1e-3, rtol=1e-3)

"""Decoding against the formula in float64: ragged contexts and prompts, splits, groups, precisions."""

import pytest
import torch

from bench.kernel_cases import PagedCase
from models.kernels.paged_decode import _num_splits, paged_decode

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
LENS = (1, 16, 37, 83)  # one key, a full page, and contexts that end mid-page
PROMPT_LENS = (0, 1, 10, 20)
SLOTS = (3, 0, 1, 2)


def decode(case: PagedCase, num_splits: int | None = None) -> torch.Tensor:
    return paged_decode(
        case.q_NHD,
        case.k_PsGD,
        case.v_PsGD,
        case.blocks_BM,
        case.lens_B,
        case.prompt_k_SKGD,
        case.prompt_v_SKGD,
        case.slots_B,
        case.prompt_lens_S,
        case.gate_SH,
        num_splits,
    )


def random_case(device: str, lens=LENS, prompt_lens=PROMPT_LENS, slots=SLOTS, **changes) -> PagedCase:
    options = {"heads": (3, 1), "head_dim": 64, "dtype": torch.float32} | changes
    return PagedCase.random(lens, [1] * len(lens), prompt_lens, slots, device=device, **options)


def assert_plain(case: PagedCase, out: torch.Tensor) -> None:
    assert out.dtype == case.q_NHD.dtype
    tolerance = TOLERANCE[out.dtype]
    torch.testing.assert_close(out.double(), case.plain(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("num_splits", [1, 4])
@pytest.mark.parametrize("heads", [(2, 2), (3, 1), (8, 1)])
def test_groups_of_heads(device: str, heads: tuple[int, int], num_splits: int):
    case = random_case(device, heads=heads)
    assert_plain(case, decode(case, num_splits))


@pytest.mark.parametrize("num_splits", [1, 2])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("head_dim", [64, 128, 24])
def test_precisions_and_head_sizes(device: str, head_dim: int, dtype: torch.dtype, num_splits: int):
    case = random_case(device, head_dim=head_dim, dtype=dtype, lens=(1, 19, 40, 34))
    assert_plain(case, decode(case, num_splits))


@pytest.mark.parametrize("num_splits", [1, 16])
@pytest.mark.parametrize("page", [1, 8, 48])
def test_pages_of_any_size(device: str, page: int, num_splits: int):
    """Also more splits than there are blocks of keys: those see nothing."""
    case = random_case(device, page=page, lens=(70, 5), slots=(2, 0), heads=(2, 1))
    assert_plain(case, decode(case, num_splits))


@pytest.mark.parametrize("num_splits", [1, 2])
def test_without_any_prompts(device: str, num_splits: int):
    """As a cache is before the first adapter comes: no rows at all."""
    case = random_case(device, prompt_lens=(0,), slots=(0, 0, 0, 0))
    assert_plain(case, decode(case, num_splits))


def test_more_prompt_rows_than_one_block(device: str):
    case = random_case(device, prompt_lens=(0, 70), slots=(1, 0, 1, 1))
    assert_plain(case, decode(case))


@pytest.mark.parametrize("num_splits", [1, 2])
def test_a_sequence_of_no_length_sees_its_prompts_alone(device: str, num_splits: int):
    """As the places of a batch that is padded to a size."""
    case = random_case(device, lens=(0, 5, 0, 17), slots=(2, 1, 0, 3))
    out = decode(case, num_splits)
    assert_plain(case, out)
    assert not out[2].any()


def test_queries_that_are_part_of_a_larger_product(device: str):
    case = random_case(device)
    wide = torch.cat([case.q_NHD, case.q_NHD], dim=1)
    out = decode(case)
    apart = PagedCase(**(vars(case) | {"q_NHD": wide[:, :3]}))
    assert torch.equal(decode(apart), out)


@pytest.mark.parametrize("num_splits", [1, 2])
def test_scores_beyond_the_range_of_exp(device: str, num_splits: int):
    case = random_case(device)
    case.q_NHD.mul_(1e3)
    out = decode(case, num_splits)
    torch.testing.assert_close(out.double(), case.plain(), atol=1e-3, rtol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="splits are chosen for a GPU's multiprocessors")
@pytest.mark.parametrize("programs", [1, 32, 1000, 100_000])
def test_splits_are_never_too_short(programs: int):
    assert _num_splits(programs, 16, torch.device("cuda")) == 1
    for longest in (256, 5000, 1 << 17):
        assert 1 <= _num_splits(programs, longest, torch.device("cuda")) <= longest // 256


@pytest.mark.parametrize("wrong", ["lens_B", "gate_SH", "prompt_lens_S", "v_PsGD"])
def test_wrong_shapes_are_our_bug(device: str, wrong: str):
    case = random_case(device)
    with pytest.raises(AssertionError):
        decode(PagedCase(**(vars(case) | {wrong: getattr(case, wrong)[:-1]})))

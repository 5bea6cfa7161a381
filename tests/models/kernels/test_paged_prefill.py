"""Chunks of prompts against the formula in float64: ragged chunks, contexts, prompts, groups, precisions."""

import pytest
import torch

from bench.kernel_cases import PagedCase
from models.kernels.paged_prefill import paged_prefill

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
NEW = (7, 1, 40, 16, 5)
LENS = (7, 23, 75, 80, 101)  # no context; and contexts and chunks that end mid-page
PROMPT_LENS = (0, 1, 10, 20)
SLOTS = (2, 1, 3, 0, 3)


def prefill(case: PagedCase) -> torch.Tensor:
    return paged_prefill(
        case.q_NHD,
        case.k_PsGD,
        case.v_PsGD,
        case.blocks_BM,
        case.starts,
        case.lens_B,
        int(case.starts.diff().max()),
        case.prompt_k_SKGD,
        case.prompt_v_SKGD,
        case.slots_B,
        case.prompt_lens_S,
        case.gate_SH,
    )


def random_case(
    device: str, lens=LENS, new=NEW, prompt_lens=PROMPT_LENS, slots=SLOTS, **changes
) -> PagedCase:
    options = {"heads": (3, 1), "head_dim": 64, "dtype": torch.float32} | changes
    return PagedCase.random(lens, new, prompt_lens, slots, device=device, **options)


def assert_plain(case: PagedCase) -> None:
    out = prefill(case)
    assert out.dtype == case.q_NHD.dtype
    tolerance = TOLERANCE[out.dtype]
    torch.testing.assert_close(out.double(), case.plain(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("heads", [(2, 2), (3, 1), (8, 1)])
def test_groups_of_heads(device: str, heads: tuple[int, int]):
    """Also three heads in a tile of 32 rows: a tile begins in the middle of a token's heads."""
    assert_plain(random_case(device, heads=heads))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("head_dim", [64, 128, 24])
def test_precisions_and_head_sizes(device: str, head_dim: int, dtype: torch.dtype):
    assert_plain(
        random_case(device, lens=(33, 90), new=(33, 3), slots=(2, 3), head_dim=head_dim, dtype=dtype)
    )


def test_a_chunk_longer_than_a_tile(device: str):
    """Sixteen-bit tiles of both sizes, whose keys are partly seen by all rows."""
    case = random_case(device, lens=(300, 170), new=(200, 2), slots=(3, 1), heads=(3, 1), dtype=torch.float16)
    assert_plain(case)
    assert_plain(random_case(device, lens=(150,), new=(100,), slots=(2,), dtype=torch.float16))


@pytest.mark.parametrize("page", [1, 48])
def test_pages_of_any_size(device: str, page: int):
    assert_plain(random_case(device, page=page, lens=(70, 5), new=(36, 5), slots=(2, 0), heads=(2, 1)))


def test_without_any_prompts(device: str):
    assert_plain(random_case(device, prompt_lens=(0,), slots=(0, 0, 0, 0, 0)))


def test_more_prompt_rows_than_one_block(device: str):
    assert_plain(random_case(device, prompt_lens=(0, 70), slots=(1, 0, 1, 1, 0)))


def test_chunks_that_begin_after_other_tokens(device: str):
    """`starts` need not begin at 0: the decodes come before the chunks."""
    case = random_case(device, lens=(20, 9), new=(6, 9), slots=(1, 2))
    out = prefill(case)
    shifted = vars(case) | {"q_NHD": torch.cat([torch.full_like(case.q_NHD[:4], torch.nan), case.q_NHD])}
    after = prefill(PagedCase(**(shifted | {"starts": case.starts + 4})))
    assert torch.equal(after[4:], out)


def test_scores_beyond_the_range_of_exp(device: str):
    case = random_case(device)
    case.q_NHD.mul_(1e3)
    torch.testing.assert_close(prefill(case).double(), case.plain(), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("wrong", ["starts", "gate_SH", "prompt_lens_S", "v_PsGD"])
def test_wrong_shapes_are_our_bug(device: str, wrong: str):
    case = random_case(device)
    with pytest.raises(AssertionError):
        prefill(PagedCase(**(vars(case) | {wrong: getattr(case, wrong)[:-1]})))

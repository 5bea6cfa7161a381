"""How an adapter travels through vLLM's LoRA machinery, which knows nothing of prompts and gates.

A *carrier* is a linear that nobody calls. vLLM makes room for its low-rank factors A and B in every
adapter slot, loads, evicts and counts them as it does LoRA's; the model reads the adapter out of them:

    adapter_prompt, one per layer    A [R, C]: the prompt rows; B [H, R]: column 0 the effective gates,
                                     of row 0 column 1 the number of rows, column 2 whether they see
    adapter_vectors, one per layer   A [R, ⌈F / R⌉]: norms, biases and scales, one after another
    adapter_final, one per model     the same for the final norm

All zero, as vLLM leaves the slot of an adapter without them, they change nothing. R is the rank that all
LoRA modules share, here the number of placeholders. No vLLM and no torch.nn here: the exporter runs
where vLLM may not.

Shapes: R placeholders, C hidden size, H query heads, F numbers of a layer's vectors.
"""

from __future__ import annotations

from models.adapter import linear_shape
from models.adapter_config import LINEARS, AdapterConfig, BaseSpec
from models.errors import AdapterMismatch

# Placeholders before each text. Prompts fill whole blocks of the KV cache, whose size must be a multiple
# of 32 on a CPU and of 16 on a GPU; and a rank of vLLM's must be at least as many.
ROWS = 32

PROMPT, VECTORS, FINAL = "adapter_prompt", "adapter_vectors", "adapter_final"
GATE, LENGTH, SEES = 0, 1, 2  # columns of the prompt carrier's B

Span = tuple[int, int]  # from, to


def layer_vectors(base: BaseSpec) -> dict[str, Span]:
    """Where a layer's vectors lie in its carrier. Scales are kept as s - 1, so that zero changes nothing."""
    sizes = {"has_norms": 1, "attention_norm": base.hidden_size, "feed_forward_norm": base.hidden_size}
    for name in LINEARS:
        out_features = linear_shape(base, name)[0]
        sizes |= {f"bias.{name}": out_features, f"scale.{name}": out_features}
    return _spans(sizes)


def final_vectors(base: BaseSpec) -> dict[str, Span]:
    """The same, of what belongs to no layer."""
    return _spans({"has_norm": 1, "final_norm": base.hidden_size})


def _spans(sizes: dict[str, int]) -> dict[str, Span]:
    spans, end = {}, 0
    for name, size in sizes.items():
        spans[name] = (end, end + size)
        end += size
    return spans


def columns(spans: dict[str, Span]) -> int:
    """Width of a carrier's A, whose R rows hold these vectors."""
    return -(-max(end for _, end in spans.values()) // ROWS)


def is_tuned(config: AdapterConfig) -> bool:
    """Whether such an adapter needs more than the prompt carrier."""
    tuned = config.scale_bias.bias_targets or config.scale_bias.scale_targets
    return bool(config.norms or config.final_norm or tuned)


def check_carried(config: AdapterConfig, source: str, *, tuned: bool, sight: bool) -> None:
    """Raise AdapterMismatch, with what to do, for an adapter that this engine cannot carry.

    `tuned` and `sight` say whether the engine was started with room for vectors and for images.
    """
    static = config.prompt.length if config.prompt else 0
    visual = config.vision.num_tokens if config.vision and config.vision.fusion == "early" else 0
    for refused, reason in (
        (config.max_prompt_len > ROWS, f"its prompts are longer than {ROWS} rows"),
        (0 < static != visual > 0, "its static and its visual prompts differ in length"),
        (config.prompt and config.prompt.projection != "wk_wv", "its prompts are regrouped (LitGPT 0.5.5)"),
        (config.scale_bias.scale == "input", "it scales the inputs of linears"),
        (config.lora, "it has LoRA terms"),
        (config.head, "it has an output head of its own"),
    ):
        if refused:
            raise AdapterMismatch(
                f"{source}: {reason}, which the vLLM engine cannot do; serve it with --engine native"
            )
    if is_tuned(config) and not tuned:
        raise AdapterMismatch(
            f"{source}: it has norms, biases or scales, for which this engine made no room; start it with "
            "such an adapter, or with --vllm-adapters all"
        )
    if config.vision and not sight:
        raise AdapterMismatch(
            f"{source}: it reads images, for which this engine made no room; start it with such an "
            "adapter, or with --vllm-adapters all"
        )

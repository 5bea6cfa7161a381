"""How an adapter travels through vLLM's LoRA machinery, which knows nothing of prompts and gates.

A *carrier* is a linear that nobody calls. vLLM makes room for its low-rank factors A and B in every
adapter slot, loads, evicts and counts them as it does LoRA's; the model reads the adapter out of them:

    adapter_prompt, one per layer    A [R, C]: the prompt rows; B [⌈(4 + H) / R⌉, R], one after another: the
                                     number of rows, whether they see, whether low-rank terms act on them,
                                     whether there are rows without an image, too, and the effective gates
    adapter_vectors, one per layer   A [R, ⌈F / R⌉]: norms, biases and scales, one after another
    adapter_final, one per model     the same for the final norm

LoRA's own terms go as what they are. All zero, as vLLM leaves the slot of an adapter without them, they
change nothing. R is the rank that all LoRA modules share, here the number of placeholders. No vLLM and no
torch.nn here: the exporter runs where vLLM may not.

Shapes: R placeholders, C hidden size, H query heads, F numbers of a layer's vectors.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from models.adapter import linear_shape
from models.adapter_config import LINEARS, AdapterConfig, BaseSpec, LinearName
from models.errors import AdapterMismatch

# Placeholders before each text. Prompts fill whole blocks of the KV cache, whose size must be a multiple
# of 32 on a CPU and of 16 on a GPU; and a rank of vLLM's must be at least as many.
ROWS = 32

PROMPT, VECTORS, FINAL = "adapter_prompt", "adapter_vectors", "adapter_final"
# Places in the prompt carrier's B, gates last: a token's are side by side, where reading them costs least.
LENGTH, SEES, LOW_RANK, STATIC, GATES = 0, 1, 2, 3, 4

# vLLM's names of the linears that have low-rank terms, and of their parts in files.
LINEAR_MODULES = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
LINEAR_FILES: dict[LinearName, str] = {
    "wq": "self_attn.q_proj",
    "wk": "self_attn.k_proj",
    "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj",
    "w1": "mlp.gate_proj",
    "w2": "mlp.down_proj",
    "w3": "mlp.up_proj",
}

Span = tuple[int, int]  # from, to


@dataclass(frozen=True, slots=True)
class Room:
    """What vLLM's memory was laid out for at the start, besides prompts."""

    vectors: bool = False  # norms, biases, scales
    input_scales: bool = False  # scales before linears: those that share an input are computed one by one
    low_rank: bool = False
    images: bool = False

    @staticmethod
    def needed(configs: Iterable[AdapterConfig]) -> Room:
        """By all of these adapters together."""
        room = Room()
        for config in configs:
            tuned = config.scale_bias
            scales_inputs = tuned.scale == "input"
            vectors = config.norms or config.final_norm or tuned.bias_targets or tuned.scale_targets
            room = Room(
                vectors=room.vectors or bool(vectors),
                input_scales=room.input_scales or scales_inputs,
                low_rank=room.low_rank or config.lora is not None,
                images=room.images or config.vision is not None,
            )
        return room


EVERYTHING = Room(vectors=True, input_scales=True, low_rank=True, images=True)


def layer_vectors(base: BaseSpec, *, input_scales: bool) -> dict[str, Span]:
    """Where a layer's vectors lie in its carrier. Scales are kept as s - 1, so that zero changes nothing."""
    sizes = {"has_norms": 1, "attention_norm": base.hidden_size, "feed_forward_norm": base.hidden_size}
    for name in LINEARS:
        out_features, in_features = linear_shape(base, name)
        sizes |= {f"bias.{name}": out_features, f"scale_out.{name}": out_features}
        if input_scales:
            sizes[f"scale_in.{name}"] = in_features
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


def fact_rows(num_heads: int) -> int:
    """Rows of the prompt carrier's B."""
    return -(-(GATES + num_heads) // ROWS)


def check_carried(config: AdapterConfig, source: str, room: Room) -> None:
    """Raise AdapterMismatch, with what to do, for an adapter that vLLM cannot carry or has no room for."""
    # One visual token may be repeated to any length: of equal rows the softmax is that of one.
    static = config.prompt.length if config.prompt else 0
    visual = config.vision.num_tokens if config.vision and config.vision.fusion == "early" else 0
    rank = config.lora.rank if config.lora else 0
    for refused, reason in (
        (config.max_prompt_len > ROWS, f"its prompts are longer than {ROWS} rows"),
        (0 < static != visual > 1, "its static and its visual prompts differ in length"),
        (config.prompt and config.prompt.projection != "wk_wv", "its prompts are regrouped (LitGPT 0.5.5)"),
        (rank > ROWS, f"its LoRA terms have a rank over {ROWS}"),
        (rank and config.scale_bias.scale != "none", "it has LoRA terms beside scales"),
        (config.head, "it has an output head of its own"),
    ):
        if refused:
            raise AdapterMismatch(
                f"{source}: {reason}, which the vLLM engine cannot do; serve it with --engine native"
            )
    needed = Room.needed([config])
    for missing, what in (
        (needed.vectors and not room.vectors, "norms, biases or scales"),
        (needed.input_scales and not room.input_scales, "scales of linears' inputs"),
        (needed.low_rank and not room.low_rank, "LoRA terms"),
        (needed.images and not room.images, "an eye for images"),
    ):
        if missing:
            raise AdapterMismatch(
                f"{source}: it has {what}, for which this engine made no room; start it with such an "
                "adapter, or with --vllm-adapters all"
            )

"""transformers with PEFT's adaption_prompt: `transformers_peft.py BASE THREADS`, in `.venv`.

A static batch of prompts of one length. 10 prompts in all layers but the first two, as the V1 adapters here.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from driver import Generate, serve

_PROMPTS, _SKIPPED = 10, 2


def start() -> Generate:
    # Nothing here needs torchvision, and PyPI's build of it breaks transformers' import beside a CPU torch.
    sys.modules.setdefault("torchvision", None)  # type: ignore[arg-type]
    import torch
    from peft import AdaptionPromptConfig, get_peft_model
    from transformers import LlamaForCausalLM

    base, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    layers = model.config.num_hidden_layers - _SKIPPED
    config = AdaptionPromptConfig(adapter_len=_PROMPTS, adapter_layers=layers, task_type="CAUSAL_LM")
    model = get_peft_model(model, config).eval()

    def generate(prompts: Sequence[list[int]], max_tokens: int) -> list[list[float]]:
        ids = torch.tensor(prompts)
        times: list[float] = []

        def note(ids: Any, scores: Any, **_: Any) -> Any:
            times.append(time.perf_counter())
            return torch.zeros(len(prompts), dtype=torch.bool)

        with torch.inference_mode():
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=max_tokens,
                max_new_tokens=max_tokens,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=[note],
            )
        return [times] * len(prompts)

    return generate


if __name__ == "__main__":
    serve(start)

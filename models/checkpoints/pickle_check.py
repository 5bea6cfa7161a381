"""What a pickle calls, how deep it nests and how much it shares, told before anything of it is made.

`weights_only` lets a pickle call more than tensors need: what gives memory as it was left, or much of
little. And of what a pickle holds in one place it can hold any number of references: thirty lists, each of
them twice the one before, are a hundred bytes and print as gigabytes. Torch prints what it does not know,
and a dict hashes its keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from pickletools import genops, markobject
from typing import IO

import torch

from models.errors import CheckpointError

_STORAGES = ("BFloat16", "Bool", "Byte", "Char", "Double", "Float", "Half", "Int", "Long", "Short")
_NEEDED = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch Size",
    "argparse Namespace",  # the `args` of a training checkpoint
    *(f"torch {name}Storage" for name in (*_STORAGES, "ComplexFloat", "ComplexDouble")),
    *(f"torch {name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
}
_FETCH, _KEEP = ("BINGET", "LONG_BINGET"), ("BINPUT", "LONG_BINPUT")
_GROW = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD")
_DEEPEST = 64  # hashing and printing recurse; a training checkpoint is a dozen deep
_SHARED = 8  # times the file; names of types and of places are shared by all tensors


@dataclass(slots=True)
class _Value:
    """What a pickle makes: its bytes if nothing were shared, its depth, whether it was fetched again."""

    size: int = 0
    depth: int = 0
    fetched: bool = False


def check_pickle(file: Path, part: IO[bytes]) -> None:
    """Goes through one pickle of `file` and makes nothing. Raises CheckpointError for what no tensors need.

    Of a damaged one raises what `pickletools` does, or an IndexError or KeyError.
    """
    memo: dict[object, _Value] = {}
    stacks: list[list[_Value]] = [[]]  # a new one at each mark
    begin, total, limit = part.tell(), 0, _SHARED * file.stat().st_size
    for opcode, argument, _ in genops(part):
        size, begin = part.tell() - begin, part.tell()
        if opcode.name == "GLOBAL" and argument not in _NEEDED:
            called = str(argument).replace(" ", ".", 1)[:200]
            raise _refused(
                file, f"it calls {called}, which no tensor needs and which could run code or fill the memory"
            )
        if opcode.name in _FETCH:
            value = memo[argument]
            value.fetched = True
            stacks[-1].append(value)
            total += value.size
            if total > limit:
                raise _refused(file, "it refers to the same values so often that they could fill the memory")
        elif opcode.name in _KEEP:
            memo[argument] = stacks[-1][-1]
        elif opcode.name == "MARK":
            stacks.append([])
        else:
            marked = markobject in opcode.stack_before
            parts = stacks.pop() if marked else []
            parts += [stacks[-1].pop() for _ in opcode.stack_before[: -2 if marked else None]]
            made = parts.pop() if opcode.name in _GROW else _Value()
            if made.fetched:  # it would grow wherever it is, or come to hold itself
                raise _refused(file, "it adds to values that it has referred to, as no file of tensors does")
            made.size += size + sum(one.size for one in parts)
            made.depth = max([made.depth, *(1 + one.depth for one in parts)])
            if made.depth > _DEEPEST:
                raise _refused(file, f"it nests values more than {_DEEPEST} deep, as no file of tensors does")
            stacks[-1] += [made] * len(opcode.stack_after)


def _refused(file: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{file}: refused; {why}. Save dense tensors alone, best as safetensors")

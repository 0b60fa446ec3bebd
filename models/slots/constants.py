"""Small tensors of counts that every cycle needs again: made once for each size and device.

Owns them. They are shared, so nobody writes to them. A compiler makes them part of its graph instead.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar, cast

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def made_once(make: Callable[P, R]) -> Callable[P, R]:
    """Keep what a function has made for arguments. While a cycle is compiled, nothing is kept: its tensors have no numbers then.

    Args:
        make: of arguments that can be hashed.

    Returns:
        The same, from memory where it can be.
    """
    kept = cast(Callable[P, R], lru_cache(maxsize=512)(make))

    @wraps(make)
    def remembered(*arguments: P.args, **named: P.kwargs) -> R:
        return make(*arguments, **named) if torch.compiler.is_compiling() else kept(*arguments, **named)

    return remembered


@made_once
def counting(count: int, device: torch.device) -> Tensor:
    """The numbers from 0 on.

    Args:
        count: how many.
        device: where they lie.

    Returns:
        int64 [count], not to be written to.
    """
    return torch.arange(count, device=device)


@made_once
def repeated(numbers: tuple[int, ...], counts: tuple[int, ...], device: torch.device) -> Tensor:
    """Numbers, each of them repeated.

    Args:
        numbers: which ones.
        counts: how often each occurs.
        device: where they lie.

    Returns:
        int64 [sum of the counts], not to be written to.

    Example:
        the numbers 1 and 2 with the counts 2 and 3 give ``[1, 1, 2, 2, 2]``.
    """
    cells = [number for number, count in zip(numbers, counts, strict=True) for _ in range(count)]
    return torch.tensor(cells, dtype=torch.int64, device=device)


@made_once
def number(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One number.

    Args:
        value: the number.
        dtype: of the tensor.
        device: where it lies.

    Returns:
        [1], not to be written to.
    """
    return torch.full((1,), value, dtype=dtype, device=device)


@made_once
def lower_triangle(count: int, device: torch.device) -> Tensor:
    """Which numbers are not above each number.

    Args:
        count: how many.
        device: where they lie.

    Returns:
        bool [count, count], not to be written to: ``[i, j]`` is True where j is at most i.
    """
    return torch.ones(count, count, dtype=torch.bool, device=device).tril()

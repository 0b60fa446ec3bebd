"""Small tensors of counts that every cycle needs again: made once for each size and device.

Owns them. They are shared, so nobody writes to them. A compiler makes them part of its graph instead.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from threading import Lock
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
_MOST = 512
_HELD: ContextVar[list[Any] | None] = ContextVar("held", default=None)


@contextmanager
def holding() -> Iterator[list[Any]]:
    """Collect what is asked for inside, for a graph that is captured inside: it reads these tensors for as long as it lives.

    This memory may forget them sooner. What is made inside is not remembered, since a capture computes nothing.

    Yields:
        The list of all that was asked for.
    """
    held: list[Any] = []
    before = _HELD.set(held)
    try:
        yield held
    finally:
        _HELD.reset(before)


def made_once(make: Callable[P, R]) -> Callable[P, R]:
    """Keep what a function has made for arguments. While a cycle is compiled, nothing is kept: its tensors have no numbers then.

    Threads may ask at the same time.

    Args:
        make: of arguments that can be hashed.

    Returns:
        The same, from memory where it can be; the memory forgets what was not asked for longest.
    """
    kept: OrderedDict[Any, R] = OrderedDict()
    lock = Lock()

    @wraps(make)
    def remembered(*arguments: P.args, **named: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return make(*arguments, **named)
        key, held = (arguments, tuple(sorted(named.items()))), _HELD.get()
        with lock:
            value = kept.get(key)
            if value is not None:
                kept.move_to_end(key)
        if value is None:
            # Models run in inference mode, and whoever trains uses the same tensors.
            with torch.inference_mode(False):
                value = make(*arguments, **named)
            if held is None:
                with lock:
                    value = kept.setdefault(key, value)  # another thread may have been faster
                    if len(kept) > _MOST:
                        kept.popitem(last=False)
        if held is not None:
            held.append(value)
        return value

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

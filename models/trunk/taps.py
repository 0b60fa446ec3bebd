"""Taps: hooks that keep the states of a decoder's layers while a forward asks for them.

Owns the hooks and what they keep. They are set once, so that a forward adds and removes none, which a compiled or captured forward could
not. They go when the object that owns them goes.

Shape legend: B batch rows, N new tokens, D hidden.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@dataclass
class _Kept:
    """What hooks write to: the names that the forward in progress asks for, and the states [B, N, D] of those so far."""

    wanted: tuple[str, ...] = ()
    states: dict[str, Tensor] = field(default_factory=dict)


class Taps:
    """The tapped layers of one decoder."""

    def __init__(self) -> None:
        self._kept = _Kept()
        self._names: set[str] = set()
        self._handles: list[RemovableHandle] = []
        weakref.finalize(self, _remove, self._handles)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def tap_input(self, name: str, module: nn.Module) -> None:
        """Keep the first argument of a module under a name."""
        self._names.add(name)
        self._handles.append(module.register_forward_pre_hook(_input_hook(name, self._kept)))

    def tap_output(self, name: str, module: nn.Module) -> None:
        """Keep the output of a module under a name; of a tuple, its first entry."""
        self._names.add(name)
        self._handles.append(module.register_forward_hook(_output_hook(name, self._kept)))

    @contextmanager
    def catching(self, names: tuple[str, ...]) -> Iterator[dict[str, Tensor]]:
        """Keep the states of these layers in the dict that is given; outside, calls of the same modules keep nothing."""
        self._kept.wanted, self._kept.states = names, {}
        try:
            yield self._kept.states
        finally:
            # Forgotten here, or the last forward's states would stay in memory until the next one.
            self._kept.wanted, self._kept.states = (), {}


def _input_hook(name: str, kept: _Kept) -> Callable[..., None]:
    def keep(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if name in kept.wanted:
            kept.states[name] = inputs[0]

    return keep


def _output_hook(name: str, kept: _Kept) -> Callable[..., None]:
    def keep(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if name in kept.wanted:
            kept.states[name] = output if isinstance(output, Tensor) else output[0]

    return keep


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()

"""State of batch rows, whatever it is made of: a row's part of it is replaced, or a whole state is written over another.

Owns the walk over what such a state holds: tensors and lists with one entry a row, caches, and dicts and dataclasses of these. A family of
drafters gets refilled rows and fixed addresses by it without any code of its own. Knows no family.

Shape legend: B batch rows, R rows that are replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from draftsmith.models.slots.slot_cache import SlotCache


class UnknownState(TypeError):
    """A state holds what this walk cannot tell rows apart in."""


@runtime_checkable
class ReplacesRows(Protocol):
    """A part of a state that replaces its rows by itself."""

    def replace_rows(self, fresh: Self, replaced: ReplacedRows) -> Self:
        """As :func:`put_rows`."""
        ...


@dataclass(frozen=True)
class ReplacedRows:
    """Which rows of a batch are replaced.

    Attributes:
        rows: their numbers.
        num_rows: B.
        index_R: int64, ``rows`` on the device.
    """

    rows: list[int]
    num_rows: int
    index_R: Tensor

    @classmethod
    def of(cls, rows: list[int], num_rows: int, device: torch.device) -> ReplacedRows:
        """From row numbers of a batch."""
        return cls(rows, num_rows, torch.tensor(rows, dtype=torch.int64, device=device))


def put_rows(state: Any, fresh: Any, replaced: ReplacedRows) -> Any:
    """Replace some rows of a state by those of another.

    Tensors are written in place where the new rows fit. Where they are longer (dimension 1), the result is a longer tensor.

    Args:
        state: of B rows. It must not be used afterwards.
        fresh: of R rows, made in the same way.
        replaced: which rows of ``state`` they replace, in their order.

    Returns:
        The state of B rows.

    Raises:
        UnknownState: a part of the state has no entry for each row, or differs between the two.
    """

    def put(own: Any, new: Any) -> Any:
        if isinstance(own, SlotCache):
            own.replace(replaced.rows, new)
            return own
        if isinstance(own, ReplacesRows):
            return own.replace_rows(new, replaced)
        if isinstance(own, Tensor) and own.ndim > 0 and own.shape[0] == replaced.num_rows:
            return _put_tensor(own, new, replaced.index_R)
        if isinstance(own, list) and len(own) == replaced.num_rows and len(new) == len(replaced.rows):
            entries = dict(zip(replaced.rows, new, strict=True))
            return [entries.get(row, entry) for row, entry in enumerate(own)]
        raise UnknownState(f"a {type(own).__name__} has no entry for each of {replaced.num_rows} rows")

    return _walk(state, fresh, put)


def take_rows(state: Any, rows: slice, num_rows: int) -> Any:
    """Some consecutive rows of a state. They lie in its own memory, so either of the two may be changed only where the other is done with.

    Args:
        state: of ``num_rows`` rows.
        rows: which ones.
        num_rows: B.

    Returns:
        The state of these rows.

    Raises:
        UnknownState: a part of the state has no entry for each row, or replaces its rows by itself.
    """

    def take(own: Any, _: Any) -> Any:
        if isinstance(own, SlotCache):
            return own.rows(rows)
        has_rows = not isinstance(own, ReplacesRows) and not (isinstance(own, Tensor) and own.ndim == 0)
        if has_rows and len(own) == num_rows:
            return own[rows]
        raise UnknownState(f"a {type(own).__name__} has no entry for each of {num_rows} rows")

    return _walk(state, state, take)


def all_by_rows(state: Any, num_rows: int) -> bool:
    """Whether :func:`put_rows` can replace rows of a state of ``num_rows`` rows."""

    def check(own: Any, _: Any) -> Any:
        if (
            not isinstance(own, SlotCache | ReplacesRows)
            and (len(own) if isinstance(own, list) else own.shape[:1].numel()) != num_rows
        ):
            raise UnknownState
        return own

    try:
        _walk(state, state, check)
    except UnknownState:
        return False
    return True


def append_rows(state: Any, fresh: Any, num_rows: int, num_fresh: int) -> Any:
    """Put the rows of another state behind those of a state.

    Args:
        state: of ``num_rows`` rows. It must not be used afterwards.
        fresh: of ``num_fresh`` rows, made in the same way.
        num_rows: B.
        num_fresh: R.

    Returns:
        The state of B + R rows.

    Raises:
        UnknownState: a part of the state has no entry for each row, or differs between the two.
    """

    def append(own: Any, new: Any) -> Any:
        if isinstance(own, SlotCache):
            own.append(new)
            return own
        if isinstance(own, Tensor) and own.shape[:1] == (num_rows,) and new.shape[:1] == (num_fresh,):
            width = max(own.shape[1], new.shape[1]) if own.ndim > 1 else 0
            return torch.cat([_widened(own, width), _widened(new, width)])
        if isinstance(own, list) and (len(own), len(new)) == (num_rows, num_fresh):
            return own + new
        raise UnknownState(f"a {type(own).__name__} has no entry for each of {num_rows} rows")

    return _walk(state, fresh, append)


def write_over(state: Any, new: Any) -> None:
    """Write a state into the tensors of another, whose addresses stay.

    Args:
        state: receives.
        new: of the same rows; its tensors may be shorter in dimension 1. They share no memory with those of ``state``, but for a tensor
            that stays as it is.

    Raises:
        UnknownState: a part of the state is no tensor and differs between the two.
    """

    copies: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}

    def write(own: Any, other: Any) -> Any:
        if isinstance(own, SlotCache | Tensor) and own is other:
            return own
        if isinstance(own, Tensor):
            part = own if own.shape == other.shape else own[:, : other.shape[1]]
            copies.setdefault(own.dtype, []).append((part, other))
            return own
        raise UnknownState(f"a {type(own).__name__} has no fixed address")

    _walk(state, new, write)
    for pairs in copies.values():
        # One kernel for all tensors of a dtype, as optimisers use it.
        torch._foreach_copy_([own for own, _ in pairs], [new for _, new in pairs])


def _put_tensor(own: Tensor, new: Tensor, index_R: Tensor) -> Tensor:
    if own.ndim < 2 or own.shape[1:] == new.shape[1:]:
        return own.index_copy_(0, index_R, new)
    own = _widened(own, new.shape[1])
    own[:, : new.shape[1]].index_copy_(0, index_R, new)
    return own


def _widened(own: Tensor, width: int) -> Tensor:
    """The tensor with zeros behind its dimension 1 up to ``width``, where it has that dimension and is shorter."""
    if own.ndim < 2 or own.shape[1] >= width:
        return own
    return F.pad(own, (0, 0) * (own.ndim - 2) + (0, width - own.shape[1]))


def _walk(own: Any, new: Any, change: Callable[[Any, Any], Any]) -> Any:
    """Both states part by part: ``change`` gives what takes the place of a tensor, list or cache; all else must be equal."""
    if isinstance(own, Tensor | list | SlotCache | ReplacesRows):
        return change(own, new)
    if isinstance(own, dict):
        return {key: _walk(part, new[key], change) for key, part in own.items()}
    if is_dataclass(own) and not isinstance(own, type):
        parts = {part.name: getattr(own, part.name) for part in fields(own) if part.init}
        return replace(own, **{name: _walk(part, getattr(new, name), change) for name, part in parts.items()})
    if own is new or own == new:
        return own
    raise UnknownState(f"a {type(own).__name__} differs between rows")

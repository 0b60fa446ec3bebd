"""The matrix products of a piece of code, recorded while it runs and then run again with nothing around them.

with Recorder() as recorder:
    step()
bare = Replay(recorder.products)
seconds = bare.run()
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
PLAIN = {aten.mm: 0, aten.bmm: 0, aten.addmm: 1, aten.addmm_: 1, aten.baddbmm: 1, aten.baddbmm_: 1}
"""Products, and which argument is the left factor."""
ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: 1.0,
    aten._scaled_dot_product_flash_attention: 1.0,
    aten._scaled_dot_product_efficient_attention: 1.0,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: 2.5,
    aten._scaled_dot_product_flash_attention_backward: 2.5,
    aten._scaled_dot_product_efficient_attention_backward: 2.5,
}
"""Attention kernels, and how many forwards one is worth."""


@dataclass(frozen=True)
class Like:
    """A tensor of which only the layout matters."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def make(self) -> Tensor:
        """Random numbers in that layout."""
        empty = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        return empty.normal_() if self.dtype.is_floating_point else empty.zero_()


@dataclass(frozen=True)
class Product:
    """One call: the operation and its arguments, tensors as layouts."""

    call: Any
    arguments: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def flops(self) -> float:
        """Operations; attention counts half of the square where it is causal."""
        packet, shapes = (
            self.call.overloadpacket,
            [argument.shape for argument in self.arguments if isinstance(argument, Like)],
        )
        if packet in PLAIN:
            left, right = shapes[PLAIN[packet]], shapes[PLAIN[packet] + 1]
            return 2.0 * torch.Size(left).numel() * right[-1]
        query, key = shapes[-6:][1:3] if "backward" in str(packet) else shapes[:2]
        causal = True in self.arguments or any(value is True for _, value in self.options)
        return ATTENTION[packet] * 4.0 * torch.Size(query).numel() * key[-2] / (2 if causal else 1)


class Recorder(TorchDispatchMode):
    """Notes every product that runs inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[Product] = []

    def __enter__(self) -> Recorder:
        """Starts noting."""
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Called by torch for each operation."""
        if func.overloadpacket in PLAIN or func.overloadpacket in ATTENTION:
            options = tuple((name, _like(value)) for name, value in (kwargs or {}).items())
            self.products.append(Product(func, tuple(_like(value) for value in args), options))
        return func(*args, **(kwargs or {}))

    @property
    def flops(self) -> float:
        """Operations of all of them."""
        return sum(product.flops for product in self.products)


class Replay:
    """The same products on random numbers. Equal layouts share a tensor, which is kind to the caches of this bare run."""

    def __init__(self, products: list[Product]) -> None:
        self._made: dict[Like, Tensor] = {}
        self._calls = [
            (
                product.call,
                [self._real(value) for value in product.arguments],
                {n: self._real(v) for n, v in product.options},
            )
            for product in products
        ]

    @torch.no_grad()
    def run(self) -> float:
        """Seconds."""
        started = time.perf_counter()
        for call, arguments, options in self._calls:
            call(*arguments, **options)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def _real(self, value: Any) -> Any:
        if not isinstance(value, Like):
            return value
        if value not in self._made:
            self._made[value] = value.make()
        return self._made[value]


def _like(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return Like(tuple(value.shape), tuple(value.stride()), value.dtype, value.device)

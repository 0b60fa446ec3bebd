"""Fewer products in a decoder: matrices that read the same states become one, and norms one operation.

Owns which modules of a decoder's blocks are replaced, and the way back. What is replaced gives the same numbers up to rounding; whether it
does in a whole model is proven by who asks for it (:meth:`draftsmith.models.target.target.Target.merge`). Families keep Transformers' own
modules around these. Knows no family by name.

Shape legend: D hidden, O outputs of all merged matrices together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass
class _Outputs:
    """What the first of merged matrices leaves for the others: by place, [..., O_i] each."""

    parts: list[Tensor | None] = field(default_factory=list)


class MergedFirst(nn.Linear):
    """The first of merged matrices: computes the product of all. Its own weight is the first part of the merged one.

    Attributes:
        merged: float [O, D].
        merged_bias: float [O], or None.
        sizes: how many outputs each matrix has.
        outputs: shared with the others.
    """

    merged: Tensor
    merged_bias: Tensor | None
    sizes: list[int]
    outputs: _Outputs

    def forward(self, input: Tensor) -> Tensor:
        """Multiply states [..., D]; gives the first part, [..., O_0]."""
        parts = F.linear(input, self.merged, self.merged_bias).split_with_sizes(self.sizes, dim=-1)
        self.outputs.parts = list(parts[1:])
        return parts[0]


class MergedOther(nn.Linear):
    """A further one of merged matrices: gives the part of the product that is its own.

    Attributes:
        place: which of the further ones it is, from 0 on.
        outputs: shared with the first.
    """

    place: int
    outputs: _Outputs

    def forward(self, input: Tensor) -> Tensor:
        """Give [..., O_i] of the states that the first matrix has just multiplied.

        Raises:
            RuntimeError: it has multiplied none.
        """
        parts = self.outputs.parts
        part = parts[self.place] if self.place < len(parts) else None
        if part is None:
            raise RuntimeError("the first of merged matrices was not called before this one")
        parts[self.place] = None  # or the states of all layers would stay in memory
        return part


class MergedNorm(nn.Module):
    """A mixin: an RMS norm as one operation.

    Attributes:
        merged_epsilon: of the norm.
    """

    weight: Tensor
    merged_epsilon: float

    def forward(self, states: Tensor) -> Tensor:
        """Normalise states [..., D]."""
        return F.rms_norm(states, self.weight.shape, self.weight, self.merged_epsilon)


def merge(blocks: Sequence[nn.Module]) -> int:
    """Merge what can be merged in parts of a decoder, one part at a time, so that memory grows by one block's matrices at most.

    Modules keep their parameters under their names. Matrices that are quantised, adapted, divided between processes or moved by hooks
    stay as they are.

    Args:
        blocks: of the decoder; the final norm can be one of them.

    Returns:
        How many modules were changed.
    """
    count = 0
    for block in blocks:
        for module in list(block.modules()):
            count += sum(_merge_siblings(module, names) for names in _SIBLINGS)
            epsilon = _plain_rms_norm(module)
            if epsilon is not None:
                _become(module, _merged_norm(type(module)), merged_epsilon=epsilon)  # type: ignore[arg-type]
                count += 1
    return count


def split(blocks: Sequence[nn.Module]) -> None:
    """Let every matrix and norm compute by itself again.

    Args:
        blocks: as they were given to :func:`merge`.
    """
    for block in blocks:
        for module in block.modules():
            if isinstance(module, MergedFirst):
                del module.merged, module.merged_bias
            if isinstance(module, MergedFirst | MergedOther):
                module.__class__ = nn.Linear  # type: ignore[assignment]
            elif isinstance(module, MergedNorm):
                module.__class__ = type(module).__bases__[1]


def _merge_siblings(parent: nn.Module, names: tuple[str, ...]) -> int:
    linears = [getattr(parent, name, None) for name in names]
    plain = [linear for linear in linears if type(linear) is nn.Linear and _is_whole(linear) and not _is_hooked(linear)]
    kinds = {(each.in_features, each.weight.dtype, each.weight.device, each.bias is None) for each in plain}
    if len(plain) != len(names) or len(kinds) != 1:
        return 0
    first, *others = plain
    sizes = [linear.out_features for linear in plain]
    merged = torch.cat([linear.weight.detach() for linear in plain])
    merged_bias = None if first.bias is None else torch.cat([linear.bias.detach() for linear in plain])
    for linear, part in zip(plain, merged.split(sizes), strict=True):
        linear.weight = nn.Parameter(part, requires_grad=False)
    if merged_bias is not None:
        for linear, part in zip(plain, merged_bias.split(sizes), strict=True):
            linear.bias = nn.Parameter(part, requires_grad=False)
    outputs = _Outputs()
    first.register_buffer("merged", merged, persistent=False)
    first.register_buffer("merged_bias", merged_bias, persistent=False)
    _become(first, MergedFirst, sizes=sizes, outputs=outputs)
    for place, linear in enumerate(others):
        _become(linear, MergedOther, place=place, outputs=outputs)
    return len(names)


def _become(module: nn.Module, kind: type[nn.Module], **attributes: Any) -> None:
    module.__class__ = kind
    for name, value in attributes.items():
        setattr(module, name, value)


@cache
def _merged_norm(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Merged{kind.__name__}", (MergedNorm, kind), {})


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _is_whole(module: nn.Module) -> bool:
    """Whether a module has its class's own forward and whole weights."""
    return not hasattr(module, "_hf_hook") and not any(
        isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") or type(parameter.data) is not Tensor
        for parameter in module.parameters(recurse=False)
    )


def _plain_rms_norm(module: nn.Module) -> float | None:
    """A norm's epsilon where it is the plain RMS norm of its weight; None for all other modules, Gemma's among them.

    Hooks run before and after a norm's forward, whichever it is; the final norm has one that keeps its input.
    """
    weight = getattr(module, "weight", None)
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    is_norm = type(module).__name__.endswith("RMSNorm") and not isinstance(module, MergedNorm)
    if not (is_norm and isinstance(weight, Tensor) and weight.ndim == 1 and isinstance(epsilon, float)):
        return None
    if weight.is_meta or not _is_whole(module):
        return None
    states = torch.randn(2, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)
    with torch.inference_mode():
        own, merged = module.forward(states), F.rms_norm(states, weight.shape, weight, epsilon)
    alike = own.dtype == merged.dtype and torch.allclose(own, merged, rtol=1e-5 if own.dtype == torch.float32 else 1e-2)
    return epsilon if alike else None

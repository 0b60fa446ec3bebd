"""Fewer products in a decoder: matrices that read the same states become one, and norms one operation.

Owns which modules of a decoder's blocks are replaced, and the way back. What is replaced gives the same numbers up to rounding; whether it
does in a whole model is proven by who asks for it (:meth:`draftsmith.models.target.target.Target.merge`). Families keep Transformers' own
modules around these. Knows no family by name.

Shape legend: D hidden, O outputs of all merged matrices together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass
class _Outputs:
    """What the first of merged matrices leaves for the others: by place, [..., O_i] each."""

    parts: list[Tensor | None] = field(default_factory=list)


class MergedFirst(nn.Module):
    """Stands where the first matrix was: computes the product of all.

    Args:
        linears: the matrices, all of which read the same states.
        outputs: shared with the others.
    """

    def __init__(self, linears: Sequence[nn.Linear], outputs: _Outputs) -> None:
        super().__init__()
        self.sizes = [linear.out_features for linear in linears]
        self.in_features, self.out_features = linears[0].in_features, linears[0].out_features
        self.merged = nn.Parameter(torch.cat([linear.weight.detach() for linear in linears]), requires_grad=False)
        biases = [linear.bias for linear in linears if linear.bias is not None]
        self.bias = nn.Parameter(torch.cat([bias.detach() for bias in biases]), requires_grad=False) if biases else None
        self._outputs = outputs

    def forward(self, states: Tensor) -> Tensor:
        """Multiply states [..., D]; gives the first part, [..., O_0]."""
        parts = F.linear(states, self.merged, self.bias).split(self.sizes, dim=-1)
        self._outputs.parts = list(parts[1:])
        return parts[0]


class MergedOther(nn.Module):
    """Stands where a further matrix was: gives the part of the product that is its own.

    Args:
        linear: the matrix.
        place: which of the further ones it is, from 0 on.
        outputs: shared with the first.
    """

    def __init__(self, linear: nn.Linear, place: int, outputs: _Outputs) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._place, self._outputs = place, outputs

    def forward(self, states: Tensor) -> Tensor:
        """Give [..., O_i] of the states that the first matrix has just multiplied.

        Raises:
            RuntimeError: it has multiplied none.
        """
        parts = self._outputs.parts
        part = parts[self._place] if self._place < len(parts) else None
        if part is None:
            raise RuntimeError("the first of merged matrices was not called before this one")
        parts[self._place] = None  # or the states of all layers would stay in memory
        return part


class MergedNorm(nn.Module):
    """An RMS norm as one operation.

    Args:
        norm: with a weight.
        epsilon: of the norm.
    """

    def __init__(self, norm: nn.Module, epsilon: float) -> None:
        super().__init__()
        self.norm, self.epsilon = norm, epsilon

    def forward(self, states: Tensor) -> Tensor:
        """Normalise states [..., D]."""
        weight = self.norm.weight
        assert isinstance(weight, Tensor)
        return F.rms_norm(states, weight.shape, weight, self.epsilon)


def merge(blocks: Sequence[nn.Module]) -> int:
    """Merge what can be merged in decoder blocks, one block at a time, so that memory grows by one block's matrices at most.

    Matrices that are quantised, adapted, divided between processes or moved by hooks stay as they are.

    Args:
        blocks: of the decoder.

    Returns:
        How many modules were replaced.
    """
    count = 0
    for block in blocks:
        for parent in list(block.modules()):
            for names in _SIBLINGS:
                count += _merge_siblings(parent, names)
            for name, child in list(parent.named_children()):
                epsilon = _plain_rms_norm(child)
                if epsilon is not None and not isinstance(parent, MergedNorm):
                    setattr(parent, name, MergedNorm(child, epsilon))
                    count += 1
    return count


def split(blocks: Sequence[nn.Module]) -> None:
    """Put separate matrices and the families' own norms back.

    Args:
        blocks: as they were given to :func:`merge`.
    """
    for block in blocks:
        for parent in list(block.modules()):
            for names in _SIBLINGS:
                if isinstance(getattr(parent, names[0], None), MergedFirst):
                    _split_siblings(parent, names)
            for name, child in list(parent.named_children()):
                if isinstance(child, MergedNorm):
                    setattr(parent, name, child.norm)


def _merge_siblings(parent: nn.Module, names: tuple[str, ...]) -> int:
    linears = [getattr(parent, name, None) for name in names]
    plain = [linear for linear in linears if isinstance(linear, nn.Linear) and _is_plain(linear)]
    kinds = {(each.in_features, each.weight.dtype, each.weight.device, each.bias is None) for each in plain}
    if len(plain) != len(names) or len(kinds) != 1:
        return 0
    outputs = _Outputs()
    setattr(parent, names[0], MergedFirst(plain, outputs))
    for place, (name, linear) in enumerate(zip(names[1:], plain[1:], strict=True)):
        setattr(parent, name, MergedOther(linear, place, outputs))
    return len(names)


def _split_siblings(parent: nn.Module, names: tuple[str, ...]) -> None:
    first = getattr(parent, names[0])
    weights = first.merged.split(first.sizes)
    biases = [None] * len(names) if first.bias is None else first.bias.split(first.sizes)
    for name, weight, bias in zip(names, weights, biases, strict=True):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        setattr(parent, name, linear.eval())


def _is_plain(module: nn.Module) -> bool:
    """Whether nothing but its class's own forward and whole weights make up a module."""
    hooked = module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook")
    whole = all(
        type(parameter.data) is Tensor and not isinstance(parameter, DTensor) and not hasattr(parameter, "ds_id")
        for parameter in module.parameters(recurse=False)
    )
    return not hooked and whole and type(module) in (nn.Linear, *_rms_norm_types(module))


def _rms_norm_types(module: nn.Module) -> tuple[type, ...]:
    kind = type(module)
    return (kind,) if kind.__name__.endswith("RMSNorm") else ()


def _plain_rms_norm(module: nn.Module) -> float | None:
    """A norm's epsilon where it is the plain RMS norm of its weight; None for all other modules, Gemma's among them."""
    weight = getattr(module, "weight", None)
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not (isinstance(weight, Tensor) and weight.ndim == 1 and isinstance(epsilon, float) and _is_plain(module)):
        return None
    if isinstance(module, nn.Linear) or weight.is_meta:
        return None
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, len(weight), generator=generator).to(weight)
    with torch.inference_mode():
        own, merged = module(states), F.rms_norm(states, weight.shape, weight, epsilon)
    alike = own.dtype == merged.dtype and torch.allclose(own, merged, rtol=1e-5 if own.dtype == torch.float32 else 1e-2)
    return epsilon if alike else None

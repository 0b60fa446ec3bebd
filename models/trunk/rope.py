"""Rotary factors that change with the length of the text, chosen for each token by its own row's length.

Two kinds of rotary positions do so: ``longrope`` has short and long factors, ``dynamic`` (NTK) has others for every length past the
original context. Transformers chooses them by the longest position of a forward. So a long row would change the short ones. A tree
or a chunk of a prompt would be read with other factors than the same tokens one by one. Here each token names the length itself.

The rule is that of transformers' ``generate`` for one request alone. A token's factors are those of the text as it was when the token was
first read: for the prompt's tokens the whole prompt, for later ones the text up to the token. Phi-3 and its kin read the whole text again
where it crosses from short to long factors (``rereads_past``).

Owns that rule and how it is put upon a model. Knows nothing of masks and caches.

Shape legend: B batch rows, N tokens of a forward, M = N + 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

LONG, DYNAMIC = "longrope", "dynamic"
# Their `prepare_inputs_for_generation` forgets the cache where the text grows past `original_max_position_embeddings`.
_REREADING = ("phi3", "phimoe")


class LengthRopes:
    """The modules of a model whose rotary factors change with length; falsy where it has none.

    Args:
        modules: these modules.
        rereads_past: the text length past which the model reads all of its text again, with the factors of long texts. None where
            tokens keep the factors that they were first read with.
    """

    def __init__(self, modules: list[nn.Module], rereads_past: int | None) -> None:
        self._modules = modules
        self.rereads_past = rereads_past

    @classmethod
    def of(cls, base: PreTrainedModel) -> LengthRopes:
        """Find those of a decoder.

        Args:
            base: the decoder.

        Returns:
            Its modules.
        """
        modules = [module for module in base.modules() if {LONG, DYNAMIC} & set(_rope_types(module).values())]
        rereads = bool(modules) and base.config.get_text_config().model_type in _REREADING
        return cls(modules, _boundary(modules[0], None) if rereads else None)

    def __bool__(self) -> bool:
        return bool(self._modules)

    @contextmanager
    def choosing(self, lengths_BN: Tensor | None) -> Iterator[None]:
        """Choose the factors of the forwards inside by text lengths.

        Args:
            lengths_BN: int64, each at least its token's position + 1; None leaves the model's own choice.

        Yields:
            Once, nothing.
        """
        hooks = [] if lengths_BN is None else [(module, partial(_chosen, lengths_BN)) for module in self._modules]
        handles = [module.register_forward_hook(hook, with_kwargs=True) for module, hook in hooks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _rope_types(module: nn.Module) -> dict[str | None, str]:
    """What a rotary module computes, by layer type where it tells them apart; empty for other modules."""
    kinds = getattr(module, "rope_type", None)
    if isinstance(kinds, str):
        return {None: kinds}
    return dict(kinds) if isinstance(kinds, dict) else {}


def _boundary(module: Any, layer_type: str | None) -> int:
    """The text length up to which the factors are those of short texts."""
    if _rope_types(module)[layer_type] == DYNAMIC:
        return int(module.original_max_seq_len)
    parameters = module.config.rope_parameters
    return int((parameters if layer_type is None else parameters[layer_type])["original_max_position_embeddings"])


def _chosen(lengths_BN: Tensor, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """A forward hook: factors [B, N, ...] of which each token's are those of its own text length."""
    layer_type = kwargs.get("layer_type", args[2] if len(args) > 2 else None)
    kind = _rope_types(module)[layer_type]
    if kind not in (LONG, DYNAMIC):
        return output
    boundary = _boundary(module, layer_type)
    lengths_BN = lengths_BN.clamp(min=boundary)
    if kind == LONG:
        lengths_BN, distinct = lengths_BN.clamp(max=boundary + 1), [boundary, boundary + 1]
    else:
        distinct = lengths_BN.unique().tolist()
    chosen = None
    for length in distinct:
        if kind == DYNAMIC:
            _factors(module, args, kwargs, 1)  # or those of the longest text so far would stay
        # Past the boundary, long factors are those of every length.
        factors = _factors(module, args, kwargs, length, clamped=kind == DYNAMIC or length == boundary)
        chosen = factors if chosen is None else _where(lengths_BN == length, factors, chosen)
    _factors(module, args, kwargs, 1)  # leaves the module as one that has read nothing
    return chosen


def _factors(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], length: int, clamped: bool = True
) -> Any:
    """What the module gives in a forward that reaches the last position of a text of this length; positions behind count as that one."""
    positions_BN = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
    last_B1 = positions_BN.new_full((positions_BN.shape[0], 1), length - 1)
    with_last_BM = torch.cat([positions_BN.clamp(max=length - 1) if clamped else positions_BN, last_B1], dim=1)
    if "position_ids" in kwargs:
        factors = module.forward(*args, **{**kwargs, "position_ids": with_last_BM})
    else:
        factors = module.forward(args[0], with_last_BM, *args[2:], **kwargs)
    return factors[:, :-1] if isinstance(factors, Tensor) else tuple(part[:, :-1] for part in factors)


def _where(chosen_BN: Tensor, factors: Any, others: Any) -> Any:
    if isinstance(factors, Tensor):
        # Of a target over several devices (device_map), the module may lie on another than the ids.
        chosen_BN = chosen_BN.to(factors.device)
        return torch.where(chosen_BN[(...,) + (None,) * (factors.ndim - 2)], factors, others)
    return tuple(_where(chosen_BN, part, other) for part, other in zip(factors, others, strict=True))

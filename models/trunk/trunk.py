"""The target's decoder without its head, run with explicit masks, positions and caches.

Owns the forward that every family takes alike: masks as the family wants them, and rotary factors by each row's own length. Owns also
the states of layers by name. Knows no embedding, no head, no drafter, no tree and no cache layout.

``last.pre_norm`` is the last decoder block's output *before* the final norm (Hugging Face's ``hidden_states[-1]`` is after it).
``layer.{i}.output`` is the output of the 0-based decoder block i.

Shape legend: B batch rows, N new tokens, S cache slots, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import wraps
from typing import TYPE_CHECKING, Any, ClassVar, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from draftsmith.models.slots.attention import skipping, skips_blocks
from draftsmith.models.slots.row_caches import RowCaches
from draftsmith.models.slots.slot_cache import SlotCache
from draftsmith.models.trunk.attention import NAME
from draftsmith.models.trunk.known_models import decoder_blocks, final_norm
from draftsmith.models.trunk.riders import RIDERS, Carried, Entrances
from draftsmith.models.trunk.rope import LengthRopes
from draftsmith.models.trunk.taps import Taps

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

P = ParamSpec("P")
R = TypeVar("R")
PRE_NORM = "last.pre_norm"
SLIDING = "sliding_attention"


def _without_gradients(forward: Callable[P, R]) -> Callable[P, R]:
    """Run a forward in inference mode, or in a compiled one, which cannot enter it, without gradients."""

    @wraps(forward)
    def plain(*arguments: P.args, **named: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            with torch.no_grad():
                return forward(*arguments, **named)
        with torch.inference_mode():
            return forward(*arguments, **named)

    return plain


@dataclass(frozen=True)
class TargetOutput:
    """States of one forward.

    Attributes:
        pre_norm: [B, N, D], the last block's output before the final norm.
        normed: [B, N, D], the same after it.
        layers: the other layers asked for, by name, [B, N, D] each; with riders, their normed states [B, M, K D] by the name ``RIDERS``.
    """

    pre_norm: Tensor
    normed: Tensor
    layers: dict[str, Tensor] = field(default_factory=dict)

    def feature(self, name: str) -> Tensor:
        """Give a layer's states.

        Args:
            name: ``last.pre_norm``, or one of ``layers``.

        Returns:
            [B, N, D].
        """
        return self.pre_norm if name == PRE_NORM else self.layers[name]

    def where(self, chosen: Tensor, other: TargetOutput) -> TargetOutput:
        """Mix the states of two forwards over the same tokens.

        Args:
            chosen: bool [B, N], True where these states are taken.
            other: taken elsewhere.

        Returns:
            The mixed states.
        """
        pick = chosen[..., None]
        return TargetOutput(
            torch.where(pick, self.pre_norm, other.pre_norm),
            torch.where(pick, self.normed, other.normed),
            {name: torch.where(pick, states, other.layers[name]) for name, states in self.layers.items()},
        )


@dataclass(frozen=True)
class MaskStyle:
    """How a family takes its masks, or reads on where it keeps a recurrent state.

    Attributes:
        kinds: the layer types that get a mask each, by name; empty where one mask is for all layers.
        window: how many tokens a layer with a sliding window sees, itself included; None without one.
        in_steps: whether a decoder with a recurrent state reads one token a forward behind its first forward, as the others read several.
    """

    kinds: tuple[str, ...]
    window: int | None
    in_steps: bool = False


def mask_styles(config: PreTrainedConfig) -> list[MaskStyle]:
    """The ways in which a family with this config may take its masks.

    Args:
        config: a text config.

    Returns:
        The ways, the likeliest first.
    """
    kinds = tuple(sorted(set(getattr(config, "layer_types", None) or ())))
    window = getattr(config, "sliding_window", None)
    window = window if not kinds or SLIDING in kinds else None
    return list(dict.fromkeys([MaskStyle(kinds, window), MaskStyle((), window)]))


class Trunk:
    """A decoder without its head.

    Args:
        base: the decoder, as Hugging Face has it.
        config: its text config.
        style: how it takes masks.
        name: for messages.

    Attributes:
        keeps_state: whether layers keep a recurrent state, which follows one text and takes no masks.
        skips_slots: whether attention skips the slots behind the text, where shapes are fixed and the device gains by it.
    """

    keeps_state: ClassVar[bool] = False

    def __init__(self, base: PreTrainedModel, config: PreTrainedConfig, style: MaskStyle, name: str) -> None:
        self.name = name
        self._config = config
        self.style = style
        self.max_positions: int | None = None  # the proof looks beyond the context, where rotary factors may change
        self.ropes = LengthRopes.of(base)
        self._base = base
        self._norm = final_norm(base)
        self._blocks = decoder_blocks(base)
        self._taps = Taps()
        self._entrances: Entrances | None = None
        self.rider_entries: set[tuple[int, ...]] = set()  # of riders for which it has passed the proof
        attention = getattr(config, "_attn_implementation", "sdpa")
        self._additive_mask = attention == "eager"
        self.skips_slots = attention == NAME

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self._base.dtype

    def final_norm(self, hidden: Tensor) -> Tensor:
        """Apply the final norm.

        Args:
            hidden: [..., D], states before the norm.

        Returns:
            [..., D].
        """
        return self._norm(hidden)

    @property
    def window(self) -> int | None:
        """How many tokens a layer with a sliding window sees; None where no layer has one."""
        return self.style.window

    @property
    def rereads_past(self) -> int | None:
        """The text length past which the model reads its whole text again; see :class:`~draftsmith.models.trunk.rope.LengthRopes`."""
        return self.ropes.rereads_past

    def new_cache(self, capacity: int, num_rows: int, device: torch.device) -> SlotCache | RowCaches:
        """Make what a batch's text is cached in.

        Args:
            capacity: slots of each row.
            num_rows: of the batch.
            device: where token ids go in.

        Returns:
            An empty cache.
        """
        return SlotCache(capacity, self._config.num_hidden_layers)

    def tap(self, layers: tuple[str, ...]) -> None:
        """Make the states of layers available to forwards for as long as this trunk lives.

        A forward taps what it is asked for itself. Tap layers before the first forward where forwards are compiled or captured.

        Args:
            layers: their names. The last layer before the final norm is always among them.

        Raises:
            ValueError: the model has no such layer.
        """
        for name in (PRE_NORM, *layers):
            if name in self._taps:
                continue
            if name == PRE_NORM:
                self._taps.tap_input(name, self._norm)
            else:
                self._taps.tap_output(name, self._block(name))

    def tap_before(self, block: int) -> str:
        """Make the states before a block available to forwards.

        Args:
            block: its number.

        Returns:
            Their name.
        """
        name = f"layer.{block}.input"
        if name not in self._taps:
            self._taps.tap_input(name, self._blocks[block])
        return name

    def let_riders_in(self) -> None:
        """Make riders possible for as long as this trunk lives: before the first forward, where forwards are compiled or captured."""
        if self._entrances is None:
            self._entrances = Entrances(self._blocks)

    @_without_gradients
    def forward(
        self,
        input_ids: Tensor,
        *,
        cache: Cache,
        positions: Tensor,
        mask: Tensor | None,
        key_positions: Tensor | None = None,
        layers: tuple[str, ...] = (),
        text_lengths: Tensor | None = None,
        ends: Tensor | None = None,
        riders: Carried | None = None,
    ) -> TargetOutput:
        """See :meth:`draftsmith.models.target.target.Target.forward`."""
        return self.run(
            input_ids,
            cache=cache,
            positions=positions,
            mask=mask,
            key_positions=key_positions,
            layers=layers,
            text_lengths=text_lengths,
            ends=ends,
            riders=riders,
        )

    def run(
        self,
        input_ids: Tensor,
        *,
        cache: Cache,
        positions: Tensor,
        mask: Tensor | None,
        key_positions: Tensor | None = None,
        layers: tuple[str, ...] = (),
        text_lengths: Tensor | None = None,
        ends: Tensor | None = None,
        riders: Carried | None = None,
    ) -> TargetOutput:
        """As :meth:`forward`, with gradients where its caller has them on."""
        if text_lengths is None and self.ropes:
            text_lengths = positions + 1
        self.tap(layers)
        if riders is not None:
            self.let_riders_in()
        entering = nullcontext() if self._entrances is None else self._entrances.carrying(riders)
        with self._taps.catching((PRE_NORM, *layers)) as states, self.ropes.choosing(text_lengths), entering:
            output = self._base(
                input_ids=input_ids,
                position_ids=positions,
                attention_mask=None if mask is None else self._masks(mask, positions, key_positions, ends),
                past_key_values=cache,
                use_cache=True,
            )
        return _output(output.last_hidden_state, states, layers, input_ids.device, riders)

    __call__ = forward

    @_without_gradients
    def prefix(self, input_ids: Tensor, layers: tuple[str, ...] = (), read: Tensor | None = None) -> TargetOutput:
        """See :meth:`draftsmith.models.target.target.Target.prefix`."""
        if not self.ropes:
            return self._whole(input_ids, layers, None)
        B, T = input_ids.shape
        place = torch.arange(T, device=input_ids.device)
        num_read = torch.full((B, 1), T, device=input_ids.device) if read is None else read[:, None]
        first = self._whole(input_ids, layers, torch.maximum(num_read, place + 1))
        boundary = self.rereads_past
        if read is None or boundary is None or boundary >= T:
            return first
        again = self._whole(input_ids, layers, torch.full_like(input_ids, T))
        return again.where((place >= boundary).expand(B, T), first)

    @property
    def vocab_size(self) -> int:
        """How many tokens the model knows."""
        return int(self._config.vocab_size)

    @property
    def blocks(self) -> list[nn.Module]:
        """The decoder blocks in order."""
        return self._blocks

    @property
    def norm(self) -> nn.Module:
        """The final norm."""
        return self._norm

    def check_layer(self, name: str) -> None:
        """Check that the decoder has a layer.

        Args:
            name: such as ``layer.12.output``.

        Raises:
            ValueError: it has none of this name; the message says which it has.
        """
        if name != PRE_NORM:
            self._block(name)

    def _whole(self, input_ids: Tensor, layers: tuple[str, ...], text_lengths: Tensor | None) -> TargetOutput:
        self.tap(layers)
        with self._taps.catching((PRE_NORM, *layers)) as states, self.ropes.choosing(text_lengths):
            output = self._base(input_ids=input_ids, use_cache=False)
        return _output(output.last_hidden_state, states, layers, input_ids.device)

    def _block(self, name: str) -> nn.Module:
        parts = name.split(".")
        if (
            len(parts) != 3
            or parts[0] != "layer"
            or parts[2] != "output"
            or not parts[1].isdigit()
            or int(parts[1]) >= len(self._blocks)
        ):
            raise ValueError(
                f"unknown layer {name!r}; use {PRE_NORM!r} or 'layer.i.output' with i from 0 to {len(self._blocks) - 1} for {self.name}"
            )
        return self._blocks[int(parts[1])]

    def _masks(
        self, mask: Tensor, positions: Tensor, key_positions: Tensor | None, ends: Tensor | None
    ) -> Any:  # a mask, or one for each kind of layer
        windowed = mask
        if self.style.window is not None:
            if key_positions is None:
                raise ValueError("a target with a sliding window needs key_positions")
            near = positions[:, None, :, None] - key_positions[:, None, None, :] < self.style.window
            windowed = mask & near
        if not self.style.kinds:
            return self._as_mask(windowed, ends)
        return {kind: self._as_mask(windowed if kind == SLIDING else mask, ends) for kind in self.style.kinds}

    def skips_slots_on(self, device: torch.device) -> bool:
        """Whether attention skips the slots behind the text on a device, where shapes are fixed.

        Args:
            device: of the cache.
        """
        return self.skips_slots and skips_blocks(device)

    def _as_mask(self, mask: Tensor, ends: Tensor | None) -> Tensor | BlockMask:
        if ends is not None and self.skips_slots_on(mask.device):
            return skipping(mask, ends)
        if not self._additive_mask:
            return mask
        dtype = self.dtype
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def _output(
    normed: Tensor,
    states: dict[str, Tensor],
    layers: tuple[str, ...],
    device: torch.device,
    riders: Carried | None = None,
) -> TargetOutput:
    """The output of a forward; of a target over several devices (device_map), each layer leaves its states on its own."""
    others = {name: states[name].to(device) for name in layers if name != PRE_NORM}
    output = TargetOutput(states[PRE_NORM].to(device), normed.to(device), others)
    if riders is None:
        return output
    tokens = {name: part[:, : riders.num_tokens] for name, part in others.items()}
    own = riders.split(output.normed)
    return TargetOutput(
        output.pre_norm[:, : riders.num_tokens], output.normed[:, : riders.num_tokens], {**tokens, RIDERS: own}
    )

"""Riders behind tokens of packed texts, with gradients: how drafters learn that ride through a target.

The texts go through the target once without gradients. Then the riders alone go through the blocks from their entries on, beside one token
that carries none of them. They read the keys and values that the texts left, which are constants; gradients reach what the riders are made
of, and the target's weights stay frozen. What a rider computes is what it computes in decoding.

Owns these two forwards. Knows no drafter, no loss and no batch.

Shape legend: T packed tokens, A anchors (tokens with riders), K riders of each, R = K A rider rows, S slots, D hidden.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers.cache_utils import Cache

from draftsmith.models.trunk.riders import RIDERS, Carried, Riders
from draftsmith.models.trunk.trunk import Trunk


def rider_fault(trunk: Trunk, riders: Riders) -> str:
    """Why a target takes no such riders, in words for an error; empty where it does.

    The proof: riders that are given the states of real tokens come out as these tokens do.

    Args:
        trunk: of the target.
        riders: of a drafter.
    """
    if trunk.keeps_state:
        return "it keeps a recurrent state, which takes no rows beside the text"
    if trunk.ropes:
        return "its rotary factors follow the length of the text"
    if fault := riders.fault(len(trunk.blocks)) or _placement_fault(trunk):
        return fault
    device = next(trunk.blocks[0].parameters()).device
    if device.type == "meta" or riders.entries in trunk.rider_entries:
        return ""
    try:
        is_exact = _tokens_ride_as_themselves(trunk, riders.entries, device)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        return f"its blocks take no further rows ({type(error).__name__}: {error!s:.120})"
    if not is_exact:
        return "its blocks compute other numbers for rows that enter behind its embedding"
    trunk.rider_entries.add(riders.entries)
    return ""


def _placement_fault(trunk: Trunk) -> str:
    """Why riders cannot enter at blocks that do not lie whole on one device; empty where they do."""
    weights = [weight for block in trunk.blocks for weight in block.parameters()]
    if any(isinstance(weight, DTensor) or hasattr(weight, "ds_tensor") for weight in weights):
        return "its weights are divided among processes, and riders enter a whole target: leave target_sharding out"
    devices = sorted({str(weight.device) for weight in weights})
    if devices[1:]:
        return (
            f"its blocks lie on {' and '.join(devices)}, and riders enter a target on one device: leave device_map out"
        )
    if devices == ["meta"] and any(hasattr(block, "_hf_hook") for block in trunk.blocks):
        return "its blocks are fetched one by one (offloaded), and riders enter a target on one device: leave device_map out"
    return ""


@torch.no_grad()
def _tokens_ride_as_themselves(trunk: Trunk, entries: tuple[int, ...], device: torch.device) -> bool:
    """Whether riders with the states of the tokens behind two anchors give what these tokens give."""
    num_riders = len(entries)
    place_T = torch.arange(num_riders + 3, device=device)
    anchors_A, one_text_T = place_T[1:3], torch.zeros_like(place_T)
    ids_T = place_T % trunk.vocab_size
    sees_TT = torch.ones(len(ids_T), len(ids_T), dtype=torch.bool, device=device).tril()
    entering = _states_at_entries(trunk, Riders(entries, _nothing), _TextKeys(), ids_T, place_T, sees_TT)
    riders = Riders(entries, lambda rider, _: entering[entries[rider]][:, anchors_A + 1 + rider])
    rode_KAD = ride_behind(trunk, riders, ids_T, place_T, one_text_T, anchors_A)
    own_TD = trunk.run(
        ids_T[None],
        cache=_TextKeys(),
        positions=place_T[None],
        mask=sees_TT[None, None],
        key_positions=place_T[None],
    ).normed[0]
    expected_KAD = torch.stack([own_TD[anchors_A + 1 + rider] for rider in range(num_riders)])
    tolerance = (1e-3 if own_TD.dtype == torch.float32 else 5e-2) * float(expected_KAD.abs().max().clamp(min=1.0))
    return torch.allclose(rode_KAD.float(), expected_KAD.float(), rtol=0.0, atol=tolerance)


def _nothing(rider: int, states: Tensor) -> Tensor:
    return states


def ride_behind(
    trunk: Trunk, riders: Riders, input_ids_T: Tensor, positions_T: Tensor, document_ids_T: Tensor, anchors_A: Tensor
) -> Tensor:
    """Let riders ride behind tokens of packed texts.

    Args:
        trunk: of the target.
        riders: what rides.
        input_ids_T: int64.
        positions_T: int64, inside each text.
        document_ids_T: int64, the text of each token.
        anchors_A: int64, the tokens with riders.

    Returns:
        [K, A, D], the riders' states after the final norm, with gradients where they are on.
    """
    T, A, K = len(input_ids_T), len(anchors_A), len(riders.entries)
    sees_TT = (document_ids_T[:, None] == document_ids_T).tril()
    text = _TextKeys()
    entering = _states_at_entries(trunk, riders, text, input_ids_T, positions_T, sees_TT)
    at_anchors = {entry: states_1TD[:, anchors_A] for entry, states_1TD in entering.items()}
    if A == 0:  # nothing rides, but what would is still part of the graph
        return torch.cat([riders.vectors(rider, at_anchors[entry]) for rider, entry in enumerate(riders.entries)])
    text.freeze(1 + K * A)
    given = replace(riders, vectors=lambda rider, _: riders.vectors(rider, at_anchors[riders.entries[rider]]))
    carried = Carried(given, torch.zeros_like(anchors_A)[None], 1)
    row_R = torch.arange(K * A, device=anchors_A.device)
    own_RR = (row_R[:, None] % A == row_R % A) & (row_R <= row_R[:, None])
    rider_RS = torch.cat([sees_TT[anchors_A].repeat(K, 1), torch.zeros_like(own_RR[:, :1]), own_RR], dim=1)
    token_1S = (torch.arange(T + 1 + K * A, device=anchors_A.device) == T)[None]
    behind_R = positions_T[anchors_A].repeat(K) + 1 + row_R // A
    if trunk.max_positions is not None:
        behind_R = behind_R.clamp(max=trunk.max_positions - 1)
    positions_1P = torch.cat([torch.zeros_like(behind_R[:1]), behind_R])[None]
    output = trunk.run(
        input_ids_T[:1][None],
        cache=text,
        positions=positions_1P,
        mask=torch.cat([token_1S, rider_RS])[None, None],
        key_positions=torch.cat([positions_T[None], positions_1P], dim=1),
        riders=carried,
    )
    return output.layers[RIDERS].unflatten(-1, (K, -1))[0].transpose(0, 1)


@torch.no_grad()
def _states_at_entries(
    trunk: Trunk, riders: Riders, text: _TextKeys, input_ids_T: Tensor, positions_T: Tensor, sees_TT: Tensor
) -> dict[int, Tensor]:
    """The texts' states [1, T, D] before each block that riders enter at; their keys and values are left in ``text``."""
    names = {entry: trunk.tap_before(entry) for entry in dict.fromkeys(riders.entries)}
    output = trunk.run(
        input_ids_T[None],
        cache=text,
        positions=positions_T[None],
        mask=sees_TT[None, None],
        key_positions=positions_T[None],
        layers=tuple(names.values()),
    )
    return {entry: output.layers[name] for entry, name in names.items()}


class _TextKeys(Cache):
    """Keys and values of the packed texts; frozen, it shows them with those of later rows, and keeps nothing of these.

    Slots are T of the texts, then those of the later rows. Where a block has fewer of
    these, zeros that its mask hides are in their place.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self._num_later: int | None = None
        self._kept: list[tuple[Tensor, Tensor]] = []

    def freeze(self, num_later: int) -> None:
        """Take no more; from now on there are slots for so many later rows."""
        self._num_later = num_later

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`draftsmith.models.slots.slot_cache.SlotCache.update`."""
        if self._num_later is None:
            self._kept.append((key_states, value_states))
            return key_states, value_states
        keys, values = self._kept[layer_idx]
        absent = (0, 0, 0, self._num_later - key_states.shape[2])
        return torch.cat([keys, F.pad(key_states, absent)], dim=2), torch.cat(
            [values, F.pad(value_states, absent)], dim=2
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the texts."""
        return self._kept[0][0].shape[2] if self._kept else 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Not asked for: all forwards have masks."""
        return self.get_seq_length() + query_length, 0

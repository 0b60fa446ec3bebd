"""Random numbers that belong to places: made where they are needed, the same on every device, with no table and no state.

Owns the hash (SplitMix64: Steele, Lea and Flood, OOPSLA 2014), the keys of requests and positions, uniforms, draws, and the noise that a
drafter guesses with. Knows neither what is drawn nor who draws it.

A key is one int64 that holds 64 hashed bits. A request's key comes from its seed, its number and the stream. A position's key comes from
the request's, and a token's from the position's. All of this is integer arithmetic that wraps around, so a CPU and a GPU agree on every
bit. Two positions share numbers only if their keys lie within V increments of each other: a chance of V / 2^63 for each pair.

Shape legend: B requests, P places, N nodes, M nodes of a layer or slots, V vocabulary, Vd draft vocabulary, K draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from draftsmith.models.slots.constants import made_once, number

Stream = Literal["choices", "cycles"]
# (weights [..., V], keys [..., K]) -> token ids [..., K]
Draw = Callable[[Tensor, Tensor], Tensor]
_STREAMS: dict[Stream, int] = {"choices": 0, "cycles": 1}


def _signed(bits: int) -> int:
    """64 bits as int64 holds them."""
    return bits - 2**64 if bits >= 2**63 else bits


_INCREMENT = _signed(0x9E3779B97F4A7C15)
_FIRST_FACTOR = _signed(0xBF58476D1CE4E5B9)
_SECOND_FACTOR = _signed(0x94D049BB133111EB)
# A hash's leading 52 bits plus a half are exact in float64, and never 0 or 2^52.
_DROPPED_BITS, _SPACING = 12, 2.0**-52
NOISE_SHARE = 0.8
"""How much of the target's noise a drafter adds to its own logits. All of it would be best for a drafter that knows the target's logits."""
# Entries of the float64 tensors that a draw over many rows and nodes makes at once.
_PART = 2**23


def request_keys(seed: int, requests: Sequence[int], stream: Stream, device: torch.device) -> Tensor:
    """Make the key of each request of one stream, the same whatever else is in its batch.

    NumPy's SeedSequence mixes the three, so that consecutive seeds and requests have nothing in common. It concatenates parts of 32 bits.
    The request is the last part, so that a seed of 64 bits never equals another seed with another request.

    Args:
        seed: of the noise, at least 0.
        requests: number of each request, at least 0.
        stream: what is drawn with the keys.
        device: of the keys.

    Returns:
        int64 [B].

    Raises:
        ValueError: a negative seed or request.
    """
    for name, least in (("seed", seed), ("request id", min(requests, default=0))):
        if least < 0:
            raise ValueError(f"a {name} is {least}; it must be 0 or a positive whole number")
    sequences = [np.random.SeedSequence(seed, spawn_key=(_STREAMS[stream], request)) for request in requests]
    states = [int(sequence.generate_state(1, np.uint64)[0]) for sequence in sequences]
    return torch.tensor([_signed(state) for state in states], dtype=torch.int64, device=device)


def keys_at(keys: Tensor, places: Tensor) -> Tensor:
    """Make the key of each place below a key. The shapes of both broadcast.

    Example: the places 0 and 1 below the key 1234567 have the first two outputs of SplitMix64 seeded with it, 6457827717110365317 and
    3203168211198807973.

    Args:
        keys: int64.
        places: int64, from 0 on.

    Returns:
        int64, the broadcast shape.
    """
    return _mixed(torch.add(keys, places + 1, alpha=_INCREMENT))


def keys_from(keys: Tensor, first: Tensor) -> Tensor:
    """Number the places below keys anew: what was place 0 becomes the place ``first``, and so on.

    Args:
        keys: int64.
        first: int64, of a shape that broadcasts with the keys'.

    Returns:
        int64, keys for :func:`keys_at`.
    """
    return torch.sub(keys, first, alpha=_INCREMENT)


def keys_behind(keys: Tensor, first: Tensor, count: int) -> Tensor:
    """Make the keys of consecutive places below keys, where each key has its own first place; see :func:`keys_at`.

    Args:
        keys: int64 [...].
        first: int64, of a shape that broadcasts with the keys'.
        count: how many.

    Returns:
        int64 [..., count].
    """
    return keys_below(torch.add(keys, first, alpha=_INCREMENT), count)


def keys_below(keys: Tensor, count: int) -> Tensor:
    """Make the keys of the first places below keys; see :func:`keys_at`.

    Args:
        keys: int64 [...].
        count: how many.

    Returns:
        int64 [..., count].
    """
    return _mixed(keys[..., None] + _increments(count, keys.device))


@made_once
def _increments(count: int, device: torch.device) -> Tensor:
    """int64 [count]: what the places from 0 on add to a key."""
    return (torch.arange(count, device=device) + 1) * _INCREMENT


def uniforms(keys: Tensor) -> Tensor:
    """Turn keys into uniform numbers.

    Args:
        keys: int64 [...], made by :func:`keys_at`.

    Returns:
        float64 [...] in (0, 1).
    """
    return _multiples(keys, _SPACING)


def draw(weights: Tensor, keys: Tensor) -> Tensor:
    """Draw one token for each key by the weights; never one of weight 0 where another has more.

    The key and a token's id give the token an exponential waiting time. The largest weight / time wins, which is the largest
    log(weight) + Gumbel noise. Rounding changes such a draw only where the two best tokens lie within the rounding. (A draw that inverts
    the cumulative distribution sums the rounding of all weights before its token.)

    Args:
        weights: float [..., V], probabilities up to a factor.
        keys: int64 [..., K].

    Returns:
        Token ids, int64 [..., K].
    """
    at_once = max(1, _PART // max(1, weights.numel()))
    parts = [_negative_times(part, weights.shape[-1]) for part in keys.split(at_once, dim=-1)]
    drawn = [_first_to_ring(weights[..., None, :], times) for times in parts]
    return drawn[0] if len(drawn) == 1 else torch.cat(drawn, dim=-1)


def draw_at(logits_BNV: Tensor, keys_BP: Tensor, place_BN: Tensor) -> Tensor:
    """Draw one token a node by the softmax of its logits. Nodes at the same place share their waiting times.

    Rows and nodes are drawn for in parts, so that float64 tensors stay small however many rows, nodes and tokens there are.

    Args:
        logits_BNV: float.
        keys_BP: int64, the key of each place.
        place_BN: int64 in [0, P).

    Returns:
        Token ids, int64 [B, N].
    """
    rows = max(1, _PART // (keys_BP.shape[1] * logits_BNV.shape[-1]))
    if len(keys_BP) <= rows:
        return _draw_rows(logits_BNV, keys_BP, place_BN)
    parts = zip(logits_BNV.split(rows), keys_BP.split(rows), place_BN.split(rows), strict=True)
    return torch.cat([_draw_rows(*part) for part in parts])


@dataclass(frozen=True)
class SharedNoise:
    """The numbers by which the target will draw its next tokens, lent to a drafter, so that it guesses what will be drawn.

    Both then draw the same token wherever their distributions agree (arXiv:2408.07978; with several candidates,
    arXiv:2506.05632). The target draws by its own logits and these numbers alone. So a draft changes no token, whatever it holds.

    Attributes:
        keys_B: int64, of the requests' output positions.
        first_B: int64, the place below the key of the token that follows the root.
        temperature: of the requests, above 0.
        processed: draft logits [..., Vd] -> the same after the requests' processors, divided by the temperature.
    """

    keys_B: Tensor
    first_B: Tensor
    temperature: float
    processed: Callable[[Tensor], Tensor]

    def onto(self, logits_BMV: Tensor, depth: int, ids: Tensor, each: bool = False) -> Tensor:
        """Add the noise to draft logits.

        Args:
            logits_BMV: float [B, M, Vd], behind nodes.
            depth: of the nodes; 0 is the root. All M have it.
            ids: int64, the target id of each of the Vd: [Vd] or, where each node has its own Vd candidates, [B, M, Vd].
            each: the m-th of the M has the depth ``depth + m`` instead. Its ``ids`` are [Vd].

        Returns:
            float32 [B, M, Vd], in the unit of the logits: at a temperature close to 0 they are the same.
        """
        count = logits_BMV.shape[1] if each else 1
        keys_BP = keys_behind(self.keys_B, self.first_B + depth, count)
        at_once = max(1, _PART // (len(keys_BP) * ids.shape[-1]))
        noise_BPV = torch.cat([_gumbel(part, ids) for part in keys_BP.split(at_once, dim=1)], dim=1)
        return (self.processed(logits_BMV.float()) + NOISE_SHARE * noise_BPV) * self.temperature

    def select_rows(self, rows_B: Tensor) -> SharedNoise:
        """The noise of some rows only; ``rows_B`` int64."""
        return replace(self, keys_B=self.keys_B[rows_B], first_B=self.first_B[rows_B])


def _draw_rows(logits_BNV: Tensor, keys_BP: Tensor, place_BN: Tensor) -> Tensor:
    """:func:`draw_at` for so few rows that the waiting times of all their places fit in memory."""
    B, N, V = logits_BNV.shape
    times_BPV = _negative_times(keys_BP, V)
    if N == 1 and keys_BP.shape[1] == 1:
        return _first_to_ring(logits_BNV.softmax(-1), times_BPV)
    row_B1 = torch.arange(B, device=logits_BNV.device)[:, None]
    nodes = max(1, _PART // (B * V))
    parts = zip(logits_BNV.split(nodes, dim=1), place_BN.split(nodes, dim=1), strict=True)
    return torch.cat([_first_to_ring(logits.softmax(-1), times_BPV[row_B1, place]) for logits, place in parts], dim=1)


def exponentials(keys: Tensor, vocab_size: int) -> Tensor:
    """Give each token its waiting time under a key.

    The shortest times decide the draws. They come from uniforms near 0 in steps of 2^-52, so a vocabulary of any size has a fine tail.

    Args:
        keys: int64 [...].
        vocab_size: V.

    Returns:
        float64 [..., V], finite and above 0.
    """
    return _negative_times(keys, vocab_size).neg_()


def _negative_times(keys: Tensor, vocab_size: int) -> Tensor:
    """:func:`exponentials` below 0, which saves draws an operation."""
    return _multiples(keys_below(keys, vocab_size), -_SPACING).log1p_()


def _gumbel(keys: Tensor, ids: Tensor) -> Tensor:
    """The Gumbel noise of some tokens under keys, float32 [..., Vd]: the logarithms of their waiting times below 0."""
    return _multiples(keys_at(keys[..., None], ids), -_SPACING).log1p_().neg_().log_().neg_().float()


def _first_to_ring(weights: Tensor, negative_times: Tensor) -> Tensor:
    """Token ids, int64 [...]: the token with the largest weight / time, of equals the lowest.

    Args:
        weights: float [..., V], at least 0.
        negative_times: float [..., V], below 0.
    """
    return (weights / negative_times).argmin(-1)


def _mixed(state: Tensor) -> Tensor:
    """SplitMix64's output for a state; changes the tensor in place."""
    state.bitwise_xor_(_shifted(state, 30)).mul_(_FIRST_FACTOR)
    state.bitwise_xor_(_shifted(state, 27)).mul_(_SECOND_FACTOR)
    return state.bitwise_xor_(_shifted(state, 31))


def _shifted(bits: Tensor, count: int) -> Tensor:
    """Shift right with zeros: torch's own shift repeats the sign."""
    return bits.bitwise_right_shift(count).bitwise_and_(2 ** (64 - count) - 1)


def _multiples(keys: Tensor, spacing: float) -> Tensor:
    """The uniform numbers of keys times a sign, float64. All numbers on the way are exact."""
    half = number(0.5 * spacing, torch.float64, keys.device)
    return torch.add(half, _shifted(keys, _DROPPED_BITS), alpha=spacing)

"""States in eight bits: e4m3 numbers, with one float32 scale a token and layer.

Owns: the two directions, what they lose, and which stored dtypes there are. Knows nothing of shards, targets or training.

Shape legend: T tokens, D hidden.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from draftsmith.data.shards.finite import check_codes, check_finite
from draftsmith.models.files.device_and_dtype import as_dtype

FLOAT8 = "float8_e4m3"
CODES = torch.float8_e4m3fn
# Of a state against its own length, for every D up to 65,536: see `quantise`.
LARGEST_ERROR = 0.07
_LARGEST_CODE = 448.0
_BLOCK = 2**18


def stored_dtype(name: str) -> torch.dtype:
    """The dtype of a cache's states by its name: those of targets, and `float8_e4m3`.

    Args:
        name: the dtype's.

    Returns:
        The dtype.

    Raises:
        ValueError: any other name.
    """
    return CODES if name == FLOAT8 else as_dtype(name)


def quantise(states: Tensor) -> tuple[Tensor, Tensor]:
    """Write states as e4m3 codes with a scale each, on their own device.

    The scale is the state's largest magnitude over 448, the largest e4m3 number; a state of zeros has the scale 1. States are read back
    as bfloat16. A scale is not finite exactly where its state is not, or where it holds what bfloat16 cannot. So whoever stores codes looks
    at the scales first: the codes themselves cannot say it.

    What is lost: a number of magnitude m in a state with scale s comes back within `e = max(m / 16, s / 1024)`. Added to that is the
    rounding to bfloat16 of what comes back, `(m + e) / 256` (2 ** -134 among its subnormal numbers). Over a whole state
    that is at most 257/256 (1/16 + sqrt(D) / 458,752) + 1/256 of its length, which `LARGEST_ERROR` bounds. It holds from
    a largest magnitude of 1e-35 on: below, scales would leave float32's normal numbers.

    Args:
        states: float [..., D].

    Returns:
        Codes float8_e4m3fn [..., D] and scales float32 [...].
    """
    largest = states.abs().amax(dim=-1).to(torch.float32)
    scales = (largest / _LARGEST_CODE).clamp_min(torch.finfo(torch.float32).tiny)
    scales = torch.where(largest == 0, torch.ones_like(scales), scales)
    scales = torch.where(largest.to(torch.bfloat16).isfinite(), scales, torch.full_like(scales, torch.inf))
    return (states.to(torch.float32) / scales[..., None]).to(CODES), scales


def dequantise(codes: Tensor, scales: Tensor, into: Tensor | None = None) -> Tensor:
    """Read codes back, as `quantise` makes them.

    On a CPU bits are moved instead of numbers converted, which is on training's path: torch converts e4m3 one number
    after the other there. Both ways give the same bits.

    Args:
        codes: float8_e4m3fn [T, D].
        scales: float32 [T].
        into: bfloat16 [T, D], filled if given.

    Returns:
        bfloat16 [T, D].
    """
    states = torch.empty_like(codes, dtype=torch.bfloat16) if into is None else into
    if codes.device.type != "cpu":
        return states.copy_(dequantise_plainly(codes, scales))
    return _by_bits(codes, scales, states)


def dequantise_plainly(codes: Tensor, scales: Tensor) -> Tensor:
    """The plain twin of `dequantise`, on any device.

    Args:
        codes: float8_e4m3fn [T, D].
        scales: float32 [T].

    Returns:
        bfloat16 [T, D].
    """
    return (codes.to(torch.float32) * scales[..., None]).to(torch.bfloat16)


def _by_bits(codes: Tensor, scales: Tensor, states: Tensor) -> Tensor:
    """Fill `states`. Rows go in blocks that stay in the processor's cache.

    An e4m3 number's bits, seven places up, are those of a float16 that is 256 times smaller. That holds for the sign, the four bits of
    exponent (biases 7 and 15), the mantissa, and subnormal numbers too.
    """
    bits, row_scales = codes.view(torch.int8), (scales * 256)[:, None]
    num_rows = max(1, _BLOCK // max(1, codes.shape[1]))
    for start in range(0, codes.shape[0], num_rows):
        rows = slice(start, start + num_rows)
        # Widening copies the sign to all upper bits: the mask keeps one of them, and the seven others of the code.
        moved = bits[rows].to(torch.int16).bitwise_left_shift_(7).bitwise_and_(-0x8000 | 0x3F80)
        states[rows] = moved.view(torch.float16).to(torch.float32).mul_(row_scales[rows])
    return states


class EightBitStates(Mapping[str, Tensor]):
    """States of samples end to end by layer name, each layer brought back to bfloat16 [T, D] when it is asked for, and not before.

    Asking for a layer raises a ValueError where its scales are not above 0, or its states are not finite.

    Args:
        codes: layer name -> float8_e4m3fn [tokens of a sample, D], one a sample.
        scales: layer name -> float32 [tokens of a sample], likewise.
        places: what errors call each sample.
        finite: refuse codes, scales and states that are no numbers.
    """

    def __init__(
        self,
        codes: Mapping[str, Sequence[Tensor]],
        scales: Mapping[str, Sequence[Tensor]],
        places: Sequence[str],
        finite: bool = True,
    ) -> None:
        self.codes, self.scales, self.places, self.finite = codes, scales, places, finite

    @classmethod
    def joined(cls, samples: Sequence["EightBitStates"]) -> "EightBitStates":
        """Join several samples end to end. Each is brought back in its place: joined afterwards, it would be copied once more.

        Args:
            samples: with the same layers.

        Returns:
            Their states.
        """
        return cls(
            {layer: [part for sample in samples for part in sample.codes[layer]] for layer in samples[0]},
            {layer: [part for sample in samples for part in sample.scales[layer]] for layer in samples[0]},
            [place for sample in samples for place in sample.places],
            all(sample.finite for sample in samples),
        )

    def __getitem__(self, layer: str) -> Tensor:
        codes = self.codes[layer]
        states = torch.empty(sum(map(len, codes)), codes[0].shape[1], dtype=torch.bfloat16)
        parts = states.split([len(part) for part in codes])
        for code, scales, part, place in zip(codes, self.scales[layer], parts, self.places, strict=True):
            dequantise(code, scales, into=part)
            if self.finite:
                check_codes(code, scales, f"{place}: hidden.{layer}")
                check_finite(part, f"{place}: hidden.{layer}")
        return states

    def __iter__(self) -> Iterator[str]:
        return iter(self.codes)

    def __len__(self) -> int:
        return len(self.codes)

"""From logits to one chosen token a node: processors, and draws whose noise belongs to the output position.

Owns the settings of a request, the options by which commands ask for them, and everything between logits and tokens. Knows nothing of
trees beyond "a node has ancestors", nor of caches and drafters.

The noise of token t at output position i of request r under seed s depends on (s, r, i, t) alone (:mod:`draftsmith.models.tree.noise`). All
nodes that compete for one position share it, only one of them is ever visited, and no drafter sees it. So plain and speculative decoding
draw the very same tokens at every temperature, and a batch draws what its rows would alone.

Shape legend: B batch rows, N tree nodes, V vocabulary, P output positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from draftsmith.decode.constraints import Constraints
from draftsmith.models.tree.noise import draw_at

# A probability as a whole number of parts, and the bits of a digit in a search for one.
_WHOLE, _DIGIT_BITS = 2**60, 10


@dataclass(frozen=True)
class GenerationSettings:
    """What a request asks for.

    Attributes:
        max_new_tokens: budget, at least 1.
        temperature: 0 is greedy.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set whose probability reaches this; 1 keeps all.
        min_p: drop tokens below this share of the most likely one's probability.
        repetition_penalty: divide (multiply, where negative) the logits of tokens already in the text; 1 is off. It also applies
            at temperature 0.
        seed: of the noise.
        eos_token_ids: any of these ends a row; it is emitted.
        stop_strings: a row ends with the first token whose text completes one of these.
        constraints: what a model's maker forbids or demands besides, or None.

    Raises:
        ValueError: a setting is outside its range, or a stop string is empty.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    eos_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    constraints: Constraints | None = None

    def __post_init__(self) -> None:
        rules = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (0.0 <= self.temperature < float("inf"), "0 (greedy) or a positive number"),
            "top_k": (self.top_k >= 0, "0 (all) or a positive count"),
            "top_p": (0.0 < self.top_p <= 1.0, "in (0, 1]"),
            "min_p": (0.0 <= self.min_p < 1.0, "in [0, 1)"),
            "repetition_penalty": (self.repetition_penalty > 0.0, "positive"),
            "seed": (self.seed >= 0, "0 or a positive whole number"),
            "stop_strings": (all(self.stop_strings), "non-empty strings"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {rule}")


@dataclass(frozen=True, kw_only=True)
class ReplyOptions:
    """How long a reply may be, and which random numbers it draws.

    Args:
        max_new_tokens: Longest reply, in tokens; a longer one is cut there.
        seed: Seed of the sampling noise. Plain and speculative decoding draw the same numbers.
    """

    max_new_tokens: int = 128
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class DrawOptions(ReplyOptions):
    """How long a reply may be, and how its tokens are drawn.

    Args:
        temperature: 0 takes the likeliest token (greedy); above 0 draws.
    """

    temperature: float = 0.0


@dataclass(frozen=True, kw_only=True)
class FilterOptions:
    """Which tokens can be drawn.

    Args:
        top_k: Draw among the k likeliest tokens; 0 for all.
        top_p: Draw within the smallest set of tokens with this probability.
        min_p: Leave out tokens below this share of the likeliest one's probability.
        repetition_penalty: Above 1 makes tokens already in the text less likely.
    """

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


GREEDY = DrawOptions()
NO_FILTERS = FilterOptions()


def settings_of(
    reply: ReplyOptions,
    filters: FilterOptions = NO_FILTERS,
    eos_token_ids: tuple[int, ...] = (),
    stop_strings: tuple[str, ...] = (),
) -> GenerationSettings:
    """The settings of a request that options ask for; greedy where they name no temperature.

    Raises:
        ValueError: one is out of range.
    """
    return GenerationSettings(**vars(reply), **vars(filters), eos_token_ids=eos_token_ids, stop_strings=stop_strings)


def process(logits_BNV: Tensor, settings: GenerationSettings, seen_BNV: Tensor | None = None) -> Tensor:
    """Logits after the request's processors, float32 [B, N, V], in Transformers' order (penalty, temperature, top-k, top-p, min-p).

    Args:
        logits_BNV: float.
        settings: at temperature 0 only the penalty applies, since none of the others moves the maximum. Constraints are for
            :func:`draftsmith.decode.processors.process_texts`.
        seen_BNV: bool, tokens already in each node's text (prompt, emitted and its own ancestors); needed with a penalty.
    """
    logits_BNV = logits_BNV.float()
    if settings.repetition_penalty != 1.0 and seen_BNV is not None:
        penalty = settings.repetition_penalty
        weakened_BNV = torch.where(logits_BNV > 0, logits_BNV / penalty, logits_BNV * penalty)
        logits_BNV = torch.where(seen_BNV, weakened_BNV, logits_BNV)
    if settings.temperature == 0.0:
        return logits_BNV
    if settings.temperature != 1.0:
        logits_BNV = logits_BNV / settings.temperature
    if 0 < settings.top_k < logits_BNV.shape[-1]:
        kth_BN1 = logits_BNV.topk(settings.top_k, dim=-1).values[..., -1:]
        logits_BNV = logits_BNV.masked_fill(logits_BNV < kth_BN1, -torch.inf)
    if settings.top_p < 1.0:
        logits_BNV = logits_BNV.masked_fill(~nucleus(logits_BNV.softmax(-1), settings.top_p), -torch.inf)
    if settings.min_p > 0.0:
        probs_BNV = logits_BNV.softmax(-1)
        logits_BNV = logits_BNV.masked_fill(probs_BNV < settings.min_p * probs_BNV.amax(-1, keepdim=True), -torch.inf)
    return logits_BNV


def nucleus(probs: Tensor, mass: float) -> Tensor:
    """The likeliest tokens that together have a probability, without a sort (arXiv:1904.09751, section 3.1).

    A token is kept where those likelier than it have less than ``mass``. Probabilities are added up as whole numbers, so no order of
    summation changes the set, and a token's place is found digit by digit, as a radix sort does. Of equally likely tokens all are kept or
    none; Transformers' processor, which sorts, may keep some of them.

    Args:
        probs: float32 [..., V], not negative, at most 1.
        mass: above 0 and below 1.

    Returns:
        bool [..., V], True at the tokens that are kept.
    """
    # Float32 numbers from 0 to 1 are ordered as their bits are, which fill three digits.
    bits = probs.view(torch.int32).long()
    masses = (probs.double() * _WHOLE).long()
    wanted, above = max(1, int(mass * _WHOLE)), torch.zeros_like(masses[..., :1])
    prefix = torch.zeros_like(above)
    for place in reversed(range(0, 3 * _DIGIT_BITS, _DIGIT_BITS)):
        shifted = bits >> place
        here = masses * ((shifted >> _DIGIT_BITS) == prefix)
        buckets = here.new_zeros(*here.shape[:-1], 2**_DIGIT_BITS)
        buckets.scatter_add_(-1, shifted & (2**_DIGIT_BITS - 1), here)
        likelier = above + buckets.sum(-1, keepdim=True) - buckets.cumsum(-1)
        digit = (likelier >= wanted).sum(-1, keepdim=True)
        above, prefix = likelier.gather(-1, digit), (prefix << _DIGIT_BITS) + digit
    return bits >= prefix


class Choices:
    """The target's own next token after each node, its distribution, and whether its logits are numbers.

    All is computed when it is first asked for.

    Args:
        processed_BNV: logits out of :func:`process`.
        settings: see :func:`choose`, as the next two.
        keys_BP: see there.
        place_BN: see there.
    """

    def __init__(
        self, processed_BNV: Tensor, settings: GenerationSettings, keys_BP: Tensor | None, place_BN: Tensor
    ) -> None:
        self._processed_BNV, self._settings, self._keys_BP, self._place_BN = processed_BNV, settings, keys_BP, place_BN
        self._tokens_BN: Tensor | None = None
        self._peaks_BN: Tensor | None = None
        self._probs_BNV: Tensor | None = None

    def tokens(self) -> Tensor:
        """int64 [B, N], the chosen tokens."""
        if self._tokens_BN is None and (self._settings.temperature == 0.0 or self._keys_BP is None):
            # One pass over the logits gives both.
            self._peaks_BN, self._tokens_BN = self._processed_BNV.max(-1)
        elif self._tokens_BN is None:
            self._tokens_BN = choose(self._processed_BNV, self._settings, self._keys_BP, self._place_BN)
        return self._tokens_BN

    def probs(self) -> Tensor:
        """float32 [B, N, V], the softmax of the processed logits."""
        if self._probs_BNV is None:
            self._probs_BNV = self._processed_BNV.softmax(-1)
        return self._probs_BNV

    def soundness(self) -> Tensor:
        """float32 [B, N]: NaN where logits hold NaN or infinity beside which no other counts, any number elsewhere."""
        if self._probs_BNV is not None:
            # There the sum of the exponentials is NaN or 0, so all probabilities are NaN.
            return self._probs_BNV[..., 0]
        if self._peaks_BN is None:
            self._peaks_BN = self._processed_BNV.amax(-1)
        # A number less itself is 0; NaN and infinity give NaN.
        return self._peaks_BN - self._peaks_BN


def choose(processed_BNV: Tensor, settings: GenerationSettings, keys_BP: Tensor | None, place_BN: Tensor) -> Tensor:
    """int64 [B, N]: each node's chosen next token; the most likely one, or a draw.

    Args:
        processed_BNV: logits out of :func:`process`.
        settings: its temperature decides.
        keys_BP: int64 noise keys of the output positions that nodes compete for; None at temperature 0.
        place_BN: int64, which of these positions each node competes for.
    """
    if settings.temperature == 0.0 or keys_BP is None:
        return processed_BNV.argmax(-1)
    return draw_at(processed_BNV, keys_BP, place_BN)

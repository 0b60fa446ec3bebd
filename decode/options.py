"""What commands ask about a reply: how long it may be, and how its tokens are drawn.

Owns names, defaults and help. Does not know what the settings do; `GenerationSettings` checks them.
"""

from __future__ import annotations

from dataclasses import dataclass

from draftsmith.decode.sampling import GenerationSettings


@dataclass(frozen=True, kw_only=True)
class ReplyOptions:
    """How long a reply may be, and which random numbers it draws.

    Args:
        max_new_tokens: Longest reply, in tokens.
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

"""How fast prompt lookup is beside plain decoding: what a drafter must beat, since prompt lookup needs no training.

Owns the race of these two. Knows nothing of shapes and their costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from draftsmith.decode import Engine, GenerationSettings
from draftsmith.evaluate.contenders import Contender, EngineContender, TransformersContender
from draftsmith.evaluate.records import Sample
from draftsmith.evaluate.report_rows import LOOKUP, PLAIN
from draftsmith.evaluate.speed import num_calls, race, speedup, track
from draftsmith.models.target.target import Target


def lookup_speedup(
    target: Target,
    samples: Sequence[Sample],
    settings: GenerationSettings,
    num_tokens: int,
    advance: Callable[[int], None] = lambda count: None,
) -> float:
    """Tokens per second of transformers' prompt lookup over those of plain decoding in the engine, prefill included.

    Args:
        target: decodes.
        samples: prompts, each decoded alone by both, one after the other.
        settings: of the replies.
        num_tokens: drafted tokens of prompt lookup.
        advance: told after each reply that one more is there.
    """
    contenders: list[Contender] = [
        EngineContender(PLAIN, Engine(target), settings),
        TransformersContender(LOOKUP, target, settings, num_tokens),
    ]
    runs = race(contenders, samples, advance=advance)
    return speedup(track(runs[LOOKUP]), track(runs[PLAIN]))


def num_lookup_replies(samples: Sequence[Sample]) -> int:
    """How many timed replies `lookup_speedup` makes."""
    return num_calls([PLAIN, LOOKUP], len(samples), 1, {})

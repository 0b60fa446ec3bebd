"""What `--recipe auto` chooses, by the number of labelled tokens: the whole table, in one place.

The page below has the measurements. A size that nobody has measured keeps what the configuration says. So does a setting that made no
difference, such as `prompt_weight`.

Owns: the rules and their words. Does not know: command lines, caches, training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from draftsmith.train.batches.labelled_text import COVERED_HELD_OUT

PAGE = "benchmarks/results/learning/2026-11-29-learning.md"
"""Where the figures behind the rules are."""


@dataclass(frozen=True)
class Corpus:
    """What a recipe chooses by.

    Attributes:
        labelled_tokens: of the cache.
        prompt_tokens: of the cache, not labelled.
        starts_from: the drafter that the run starts from; empty for new weights.
    """

    labelled_tokens: int
    prompt_tokens: int
    starts_from: str = ""


@dataclass(frozen=True)
class Choice:
    """One setting that a recipe chooses.

    Attributes:
        key: of the setting.
        value: chosen.
        why: in a line.
        rivals: other settings that say the same; whoever sets one of them has chosen.
        clears: settings that must be null beside this one.
    """

    key: str
    value: Any
    why: str
    rivals: tuple[str, ...] = ()
    clears: tuple[str, ...] = ()


@dataclass(frozen=True)
class Band:
    """Settings up to a number of labelled tokens.

    Attributes:
        below: labelled tokens; the first band that fits counts.
        epochs: how often the text is read.
    """

    below: int
    epochs: int


BANDS = (Band(below=50_000, epochs=12),)
"""What was measured, the smallest first. Larger text needs its own measurement before it gets a row."""
SMALL_TEXT_RATE = 1e-3
"""In every band: papers' rates are for weeks of text, and a few hundred steps do not get far with them."""


def auto(corpus: Corpus) -> list[Choice]:
    """The choices for a corpus; none where it is larger than what was measured.

    Args:
        corpus: labelled tokens, and what the run trains.
    """
    band = next((band for band in BANDS if corpus.labelled_tokens < band.below), None)
    if band is None:
        return []
    choices = [
        Choice(
            "trainer.max_epochs",
            band.epochs,
            f"under {band.below:,} labelled tokens, {band.epochs} epochs still raise the acceptance of held-out text",
            rivals=("trainer.max_steps", "trainer.max_time"),
        ),
    ]
    if not corpus.starts_from:
        choices.append(Choice("model.init_args.lr", SMALL_TEXT_RATE, "new weights and few steps need a high rate"))
    if not corpus.starts_from:
        choices.append(
            Choice(
                "model.init_args.draft_vocabulary",
                "covering",
                f"a smaller head costs less: the fewest tokens that hold {100 * COVERED_HELD_OUT:g} % of held-out text",
                rivals=("model.init_args.drafter.init_args.draft_vocab_size",),
                clears=("model.init_args.drafter.init_args.draft_vocab_size",),
            )
        )
    return choices


RECIPES = {"auto": auto}
"""By the name that `--recipe` takes."""

"""Which weight of the second opinion is best for a refined drafter: tokens per step of each, on the same replies.

Owns the sweep and its table. Knows neither how drafts are refined nor how they are recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from draftsmith.decode import GenerationSettings
from draftsmith.evaluate.records import Sample
from draftsmith.evaluate.strata.acceptance import tokens_per_step, tokens_per_step_interval
from draftsmith.evaluate.tune.recording import record
from draftsmith.evaluate.tune.simulate import replay
from draftsmith.models.composed.refined_drafter import RefinedDrafter
from draftsmith.models.target.target import Target
from draftsmith.models.tree.limits import DraftLimits
from draftsmith.models.tree.shapes import shape_text, short_shape

ALPHAS = (0.0, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class AlphaOutcome:
    """What one weight promises.

    Attributes:
        alpha: the weight; 0 is the control, which limits the candidates and nothing else.
        shape: the shape that it was tried with, in short.
        tokens_per_step: emitted tokens per target forward, the bonus token counted.
        interval: 95 % bootstrap over prompts.
        is_own: whether it is the drafter's own weight.
    """

    alpha: float
    shape: str
    tokens_per_step: float
    interval: tuple[float, float]
    is_own: bool


def weigh_alphas(
    target: Target,
    drafter: RefinedDrafter,
    samples: Sequence[Sample],
    settings: GenerationSettings,
    limits: DraftLimits,
    alphas: Sequence[float],
    widest: int,
    batch_size: int = 8,
    advance: Callable[[int], None] = lambda count: None,
) -> list[AlphaOutcome]:
    """Draft behind every token of the replies with each weight, and replay the cycles.

    Args:
        target: decodes; its replies do not depend on the weight.
        drafter: refined.
        samples: held-out prompts.
        settings: of the replies.
        limits: the shape to draft.
        alphas: weights to try; the drafter's own is tried too.
        widest: the width that static trees are traced with.
        batch_size: prompts decoded together.
        advance: called with the number of replies that were done since.

    Returns:
        One outcome a weight, the best first; of equals the smaller weight.
    """
    own = float(drafter.config.alpha)
    width = widest if limits.paths is not None else limits.beam_width
    outcomes = []
    for alpha in sorted({*alphas, own}):
        replies = record(
            target, drafter.with_alpha(alpha), samples, settings, [width], limits.draft_length, batch_size, advance
        )
        decoded = [replay(reply, limits) for reply in replies]
        steps, interval = tokens_per_step(decoded), tokens_per_step_interval(decoded)
        assert steps is not None
        assert interval is not None
        outcomes.append(AlphaOutcome(alpha, short_shape(shape_text(limits)), steps, interval, alpha == own))
    return sorted(outcomes, key=lambda outcome: (-outcome.tokens_per_step, outcome.alpha))


def alpha_table(outcomes: Sequence[AlphaOutcome]) -> str:
    """A Markdown table, by weight."""
    lines = ["| alpha | tokens per step (95 %) | over alpha 0 |", "|---|---|---|"]
    by_weight = sorted(outcomes, key=lambda outcome: outcome.alpha)
    control = next((outcome.tokens_per_step for outcome in by_weight if outcome.alpha == 0.0), None)
    for outcome in by_weight:
        low, high = outcome.interval
        gain = "" if control is None else f"{100 * (outcome.tokens_per_step / control - 1):+.1f} %"
        name = f"{outcome.alpha:g}{' (its own)' if outcome.is_own else ''}"
        lines.append(f"| {name} | {outcome.tokens_per_step:.2f} ({low:.2f} to {high:.2f}) | {gain} |")
    return "\n".join(lines)


def best_alpha(outcomes: Sequence[AlphaOutcome]) -> str:
    """Which weight to take, in words.

    Args:
        outcomes: the best first.
    """
    best = outcomes[0]
    own = next(outcome for outcome in outcomes if outcome.is_own)
    if best.is_own:
        return (
            f"its own alpha {own.alpha:g} gives the most tokens per step ({own.tokens_per_step:.2f} with {own.shape})"
        )
    return (
        f"alpha {best.alpha:g} gives {best.tokens_per_step:.2f} tokens per step with {best.shape}, its own {own.alpha:g} gives "
        f"{own.tokens_per_step:.2f}: write {best.alpha:g} into the drafter's config.json"
    )

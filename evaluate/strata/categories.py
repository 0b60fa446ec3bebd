"""The measures over the prompts of one category.

Owns the record, and which prompts make up a category. Does not know how the measures are made or printed.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from draftsmith.evaluate.strata.decoded import DepthAcceptance

NO_CATEGORY = "no category"
"""What reports call the prompts without a category, where others have one."""


@dataclass(frozen=True)
class Category:
    """What one contender did on the prompts of one category.

    Attributes:
        category: its name in the prompt file.
        prompts: decoded ones; each turn of a conversation is a prompt.
        tokens: emitted.
        tokens_per_step: pooled over these prompts; None when no reply needed a cycle.
        tokens_per_step_interval: 95 % bootstrap over these prompts.
        speedup: over plain decoding on these prompts; None where several prompts are decoded at once, since their seconds cannot be told
            apart.
        speedup_interval: 95 % bootstrap over these prompts.
        acceptance_by_depth: over the cycles of these prompts; empty for contenders that draft nothing.
    """

    category: str
    prompts: int
    tokens: int
    tokens_per_step: float | None
    tokens_per_step_interval: tuple[float, float] | None
    speedup: float | None
    speedup_interval: tuple[float, float] | None
    acceptance_by_depth: tuple[DepthAcceptance, ...] = ()


def prompts_by_category(categories: Mapping[int, str | None]) -> dict[str, list[int]]:
    """Group prompts by category.

    Args:
        categories: prompt number -> category; None for a prompt without one.

    Returns:
        Category -> prompt numbers, in the order of the prompts; those without a category last. Empty where no prompt has one.
    """
    groups: dict[str, list[int]] = {}
    for number, category in sorted(categories.items(), key=lambda item: (item[1] is None, item[0])):
        groups.setdefault(NO_CATEGORY if category is None else category, []).append(number)
    return groups if any(category is not None for category in categories.values()) else {}

"""Categories and context lengths as Markdown tables.

Owns their words. Does not know how a figure was measured.
"""

from collections.abc import Mapping, Sequence

from draftsmith.escapes import plain
from draftsmith.evaluate.strata.categories import Category
from draftsmith.evaluate.strata.contexts import ContextBin
from draftsmith.evaluate.strata.decoded import DepthAcceptance

NamedCategories = tuple[str, Sequence[Category]]
"""A row's name, its temperature with it where the report has several, and its categories."""
NamedBins = tuple[str, Sequence[ContextBin]]
"""The same with the row's bins of the context."""


def ranged(value: float | None, interval: tuple[float, float] | None) -> str:
    """A figure with its interval, such as `2.31 (2.10 to 2.52)`.

    Args:
        value: the figure; None where there is none.
        interval: its ends; None where there is none.

    Returns:
        The text; `-` without a figure.
    """
    if value is None:
        return "-"
    return f"{value:.2f}" + (f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else "")


def depth_cells(levels: Sequence[DepthAcceptance], deepest: int) -> list[str]:
    """The cells of a row by draft depth, conditional / marginal.

    Args:
        levels: of the row, from depth 1.
        deepest: how many cells.

    Returns:
        The cells; `-` where the row drafts less deep.
    """
    cells = [f"{level.conditional:.2f} / {level.marginal:.2f}" for level in levels]
    return cells + ["-"] * (deepest - len(cells))


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table.

    Args:
        head: of the columns, in Markdown.
        lines: cells of each line, in Markdown.

    Returns:
        The table.
    """
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" if row[0] != "---" else "|---" * len(row) + "|" for row in rows)


def prompts_of_categories(rows: Sequence[NamedCategories]) -> dict[str, int]:
    """Category -> its number of prompts, those of the row that decoded the most; in the order of the report.

    Args:
        rows: the named categories of each row.

    Returns:
        The numbers by category.
    """
    counts: dict[str, int] = {}
    for _, categories in rows:
        for part in categories:
            counts[part.category] = max(part.prompts, counts.get(part.category, 0))
    return counts


def category_text(rows: Sequence[NamedCategories]) -> str:
    """The tables by category: tokens per step, speed-up, acceptance by depth.

    Args:
        rows: the named categories of each row that is shown.

    Returns:
        Markdown; empty without categories.
    """
    counts = prompts_of_categories(rows)
    if not counts:
        return ""
    own = [(name, {part.category: part for part in categories}) for name, categories in rows]
    head = ["category", "prompts", *(plain(name) for name, _ in rows)]
    parts = ["Tokens per step (95 %):", table(head, [_category_line(name, counts, own, False) for name in counts])]
    if any(part.speedup is not None for _, categories in rows for part in categories):
        parts += ["Speed-up (95 %):", table(head, [_category_line(name, counts, own, True) for name in counts])]
    return "\n\n".join([*parts, *_depth_parts(list(counts), own)])


def _category_line(
    category: str, counts: Mapping[str, int], rows: Sequence[tuple[str, Mapping[str, Category]]], speed: bool
) -> list[str]:
    cells = [_category_cell(own.get(category), counts[category], speed) for _, own in rows]
    return [plain(category), str(counts[category]), *cells]


def _category_cell(part: Category | None, prompts: int, speed: bool) -> str:
    """A contender's figure, which says over how many prompts it is where it decoded fewer of them."""
    if part is None:
        return "-"
    text = (
        ranged(part.speedup, part.speedup_interval)
        if speed
        else ranged(part.tokens_per_step, part.tokens_per_step_interval)
    )
    return text if part.prompts == prompts or text == "-" else f"{text}, {part.prompts} of them"


def _depth_parts(categories: Sequence[str], rows: Sequence[tuple[str, Mapping[str, Category]]]) -> list[str]:
    """The heading and the table of acceptance by depth; nothing where no row drafts."""
    deepest = max((len(part.acceptance_by_depth) for _, own in rows for part in own.values()), default=0)
    if not deepest:
        return []
    lines = [
        [plain(category), plain(name), *depth_cells(own[category].acceptance_by_depth, deepest)]
        for category in categories
        for name, own in rows
        if category in own and own[category].acceptance_by_depth
    ]
    head = ["category", "drafter", *(f"depth {depth + 1}" for depth in range(deepest))]
    return ["Acceptance by depth, conditional / marginal:", table(head, lines)]


def context_text(rows: Sequence[NamedBins]) -> str:
    """The table by length of the context.

    Args:
        rows: the named bins of each row that is shown.

    Returns:
        Markdown; empty without bins.
    """
    lines = [
        [
            plain(name),
            part.name,
            str(part.prompts),
            str(part.cycles),
            ranged(part.tokens_per_step, part.tokens_per_step_interval),
        ]
        for name, bins in rows
        for part in bins
    ]
    head = ["drafter", "context", "prompts", "cycles", "tokens per step (95 %)"]
    note = "The context is the prompt and the reply before a cycle, in tokens. A reply may pass through several bins."
    return f"{note}\n\n{table(head, lines)}" if lines else ""

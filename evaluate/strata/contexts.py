"""Tokens per step by length of the context: how much a drafter still gains when texts grow long.

Owns the bins and which cycle belongs to which. Does not know who decoded, or how rows are printed.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from draftsmith.evaluate.strata.acceptance import ratio_interval
from draftsmith.evaluate.strata.decoded import Decoded

EDGES = tuple(256 * 4**power for power in range(8))
"""Where bins of the context begin, in tokens, the first one aside: 256, 1k, 4k, 16k, and so on up to 4M."""


@dataclass(frozen=True)
class ContextBin:
    """The cycles whose context had so many tokens: those of the prompt and of the reply before the cycle.

    Attributes:
        low: least number of tokens.
        high: one more than the most; None for no limit.
        prompts: with a cycle in this bin.
        cycles: target forwards after the prefill.
        tokens: that these cycles emitted.
        tokens_per_step: tokens / cycles.
        tokens_per_step_interval: 95 % bootstrap over these prompts.
    """

    low: int
    high: int | None
    prompts: int
    cycles: int
    tokens: int
    tokens_per_step: float
    tokens_per_step_interval: tuple[float, float]

    @property
    def name(self) -> str:
        """The bin in words, such as `256 to 1k`."""
        if self.high is None:
            return f"from {_short(self.low)}"
        return f"{_short(self.low)} to {_short(self.high)}" if self.low else f"below {_short(self.high)}"


def _short(tokens: int) -> str:
    for unit, size in (("M", 2**20), ("k", 2**10)):
        if tokens >= size:
            return f"{tokens // size}{unit}"
    return str(tokens)


def cycles_of(prompt_tokens: int, reply: Decoded) -> Iterator[tuple[int, int]]:
    """Context and emitted tokens of each cycle of a reply.

    The end token or the token budget may cut the last block, so a cycle emits no more than what is left of the reply.

    Example: a prompt of 10 tokens and a reply of 6, whose cycles accepted 2 and 3: the contexts are 11 and 14, the emitted tokens 3 and 2.

    Args:
        prompt_tokens: length of the prompt.
        reply: what was emitted for it.

    Yields:
        The context in tokens, and how many tokens the cycle emitted.
    """
    context, left = prompt_tokens + reply.prefill_tokens, reply.stepped_tokens
    for accepted in reply.accepted:
        emitted = min(accepted + 1, left)
        yield context, emitted
        context += emitted
        left -= emitted


def by_context(replies: Iterable[tuple[int, Decoded]], seed: int = 0) -> tuple[ContextBin, ...]:
    """Tokens per step in bins of the context.

    Args:
        replies: length of each prompt, with what was emitted for it.
        seed: of the bootstrap.

    Returns:
        The bins that have a cycle, the shortest contexts first.
    """
    sums: dict[int, dict[int, tuple[int, int]]] = {}
    for prompt, (prompt_tokens, reply) in enumerate(replies):
        for context, emitted in cycles_of(prompt_tokens, reply):
            own = sums.setdefault(bisect_right(EDGES, context), {})
            tokens, cycles = own.get(prompt, (0, 0))
            own[prompt] = (tokens + emitted, cycles + 1)
    return tuple(_bin(number, list(sums[number].values()), seed) for number in sorted(sums))


def _bin(number: int, prompts: list[tuple[int, int]], seed: int) -> ContextBin:
    """The bin behind so many edges, from tokens and cycles of each prompt."""
    tokens, cycles = ([pair[column] for pair in prompts] for column in (0, 1))
    return ContextBin(
        low=EDGES[number - 1] if number else 0,
        high=EDGES[number] if number < len(EDGES) else None,
        prompts=len(prompts),
        cycles=sum(cycles),
        tokens=sum(tokens),
        tokens_per_step=sum(tokens) / sum(cycles),
        tokens_per_step_interval=ratio_interval(tokens, cycles, seed=seed),
    )

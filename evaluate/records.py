"""What an evaluation passes from stage to stage: prompts, what each contender emitted, and rows of the report.

Owns the data and its small invariants. Does not know how anything is decoded, timed, or printed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from draftsmith.evaluate.roofline.roofline import Roofline
from draftsmith.evaluate.strata.categories import Category
from draftsmith.evaluate.strata.contexts import ContextBin
from draftsmith.evaluate.strata.decoded import Decoded, DepthAcceptance
from draftsmith.models.tree.shapes import is_sampled, short_shape


@dataclass(frozen=True)
class Sample:
    """One prompt as token ids, ready to decode.

    Attributes:
        id: the prompt's own; that of a later turn of a conversation ends in `/2`, `/3`, and so on.
        source: the data set.
        prompt_ids: what the target reads.
        category: as the prompt file names it; None where it names none.
        sub_category: a part of the category; None where the file names none.
        difficulty: as the prompt file names it; None where it names none.
        turn: the reply's place in its conversation, from 1.
        modes: in which the prompt asks for its reply, such as `thinking` and `tools`.
    """

    id: str
    source: str
    prompt_ids: tuple[int, ...]
    category: str | None = None
    sub_category: str | None = None
    difficulty: str | None = None
    turn: int = 1
    modes: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Timed:
    """One timed call: a round of prompts decoded by one contender. `samples` index the evaluation's prompt list."""

    samples: tuple[int, ...]
    batch: int
    repeat: int
    seconds: float
    decoded: tuple[Decoded, ...]


Place = tuple[int, int]  # of a round: repeat and batch
Round = Mapping[str, Timed]  # one batch, decoded by every contender (by name) that takes part


@dataclass(frozen=True)
class Divergence:
    """The first place where a contender's reply departs from plain decoding.

    `gap` is the target's logit of plain's token minus its logit of the contender's: near zero means a tie that rounding
    decided, anything else means a bug. None when it was not computed (temperature above 0).
    """

    prompt_id: str
    position: int
    plain_token: int | None
    contender_token: int | None
    gap: float | None = None


@dataclass(frozen=True)
class Slice:
    """The same measures over part of the prompts, such as one source, one turn, or looping and other replies apart."""

    by: str
    value: str
    prompts: int
    tokens: int
    tokens_per_step: float | None
    tokens_per_step_interval: tuple[float, float] | None
    speedup: float | None


@dataclass(frozen=True)
class Row:
    """One line of the report: one drafter with one shape at one temperature, against plain decoding.

    Rates are wall-clock and include the prefill. `speedup` is the pooled ratio of tokens/s over the very same prompts,
    `speedup_median` the median of the per-prompt ratios. `tokens_per_step` is pooled and counts the bonus token.

    `roofline` compares its cycles with what memory allows; None for contenders that have no ledger, and in reports of earlier versions.
    `busy_rows` is the share of an engine's rows in which a prompt was decoded, over all cycles; None where prompts are decoded one at a
    time, or by Transformers.

    `by_category` has an entry for each category, where the prompts have categories, and `by_context` one for each length of the context;
    reports of earlier versions lack both.

    `shape` is what the command line reads, or several with their numbers of rows; empty where nothing is drafted. `beam_width` is None also
    for static and sampled trees, and it and the numbers behind it for several shapes.
    """

    target: str
    drafter: str
    temperature: float
    prompts: int
    exact_share: float
    tokens_per_step: float | None
    tokens_per_step_interval: tuple[float, float] | None
    speedup: float
    tokens_per_second: float
    baseline_tokens_per_second: float
    transformers_tokens_per_second: float | None
    speedup_interval: tuple[float, float]
    speedup_median: float
    speedup_over_transformers: float | None
    engine_vs_transformers: float | None
    transformers_exact_share: float | None
    suspicious: bool
    shape: str
    beam_width: int | None
    draft_length: int | None
    node_budget: int | None
    min_probability: float
    drafter_fingerprint: str
    parameters: int
    dtype: str
    device: str
    batch_size: int
    max_new_tokens: int
    repeats: int
    tokens: int
    looping_share: float
    acceptance_by_depth: tuple[DepthAcceptance, ...] = ()
    accepted_lengths: tuple[int, ...] = ()
    stage_seconds: dict[str, float] = field(default_factory=dict)
    stage_cycles: int = 0
    slices: tuple[Slice, ...] = ()
    divergences: tuple[Divergence, ...] = ()
    roofline: Roofline | None = None
    busy_rows: float | None = None
    by_category: tuple[Category, ...] = ()
    by_context: tuple[ContextBin, ...] = ()

    @property
    def is_sampled(self) -> bool:
        """Whether its trees were sampled, so that its text equals plain decoding's in distribution only."""
        return is_sampled(self.shape)

    @property
    def label(self) -> str:
        """Short name for tables and charts, e.g. `mine 10x4` (beam width x drafted tokens)."""
        return f"{self.drafter} {short_shape(self.shape)}" if self.shape else self.drafter

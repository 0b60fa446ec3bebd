"""What an evaluation passes from stage to stage: prompts, what each contender emitted, and rows of the report.

Owns the data and its small invariants. Does not know how anything is decoded, timed, or printed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from draftsmith.evaluate.roofline.roofline import Roofline
from draftsmith.models.tree.shapes import short_shape


@dataclass(frozen=True)
class Sample:
    """One prompt as token ids, ready to decode. `source` is the category that results are split by."""

    id: str
    source: str
    prompt_ids: tuple[int, ...]


@dataclass(frozen=True)
class Decoded:
    """What one contender emitted for one prompt.

    Attributes:
        token_ids: the reply, EOS included when it was produced.
        accepted: accepted draft tokens of each decode cycle. The prefill emits the first token outside of any cycle.
        drafted: depth of the draft tree of each cycle; empty when the contender does not say.
        prefill_tokens: tokens that came with the prompt's own forward; more than one only where a prefill drafts.
        cycles_before: cycles that the rows of its call had run when the prompt took one; 0 when the contender does not say.
    """

    token_ids: tuple[int, ...]
    accepted: tuple[int, ...]
    drafted: tuple[int, ...] = ()
    prefill_tokens: int = 1
    cycles_before: int = 0

    @property
    def stepped_tokens(self) -> int:
        """Tokens emitted by decode cycles, i.e. all but the prefill's."""
        return max(len(self.token_ids) - self.prefill_tokens, 0)

    @property
    def cycles(self) -> int:
        """Target forwards after the prefill."""
        return len(self.accepted)


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
class DepthAcceptance:
    """Acceptance at one draft depth.

    Attributes:
        depth: 1 is the first drafted token after the root.
        reached: cycles whose previous depth was accepted and that drafted this deep.
        accepted: cycles that accepted this depth.
        conditional: accepted / reached.
        marginal: accepted / all cycles.
    """

    depth: int
    reached: int
    accepted: int
    conditional: float
    marginal: float


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
    """The same measures over part of the prompts: one source, or looping and other replies apart."""

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

    @property
    def is_sampled(self) -> bool:
        """Whether its trees were sampled, so that its text equals plain decoding's in distribution only."""
        return self.shape[:1] in ("s", "k")

    @property
    def label(self) -> str:
        """Short name for tables and charts, e.g. `mine 10x4` (beam width x drafted tokens)."""
        return f"{self.drafter} {short_shape(self.shape)}" if self.shape else self.drafter

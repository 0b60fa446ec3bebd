"""`draftsmith tune`: which draft shape is fastest for one target, drafter and machine.

Owns the order of the work: load, record, time, weigh, write. Does not know how any of it is done.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from draftsmith import provenance
from draftsmith.arguments import FLAT
from draftsmith.data.cache.reader import HiddenStateCache
from draftsmith.data.progress import metered, progress
from draftsmith.data.prompts import PROMPT_FILE, PromptSelection
from draftsmith.decode import GenerationSettings
from draftsmith.decode.model_settings import for_target
from draftsmith.decode.sampling import GREEDY, DrawOptions, settings_of
from draftsmith.escapes import visible
from draftsmith.evaluate.contenders import lookup_refusal
from draftsmith.evaluate.drafters import Entry, parse_entries
from draftsmith.evaluate.evaluate_command import load_candidates
from draftsmith.evaluate.measure import LOOKUP_TOKENS, Candidate
from draftsmith.evaluate.records import Sample
from draftsmith.evaluate.samples import readable_by, selected_samples
from draftsmith.evaluate.slow_drafters import slow_shapes
from draftsmith.evaluate.tune.alphas import ALPHAS, AlphaOutcome, best_alpha, weigh_alphas
from draftsmith.evaluate.tune.by_rows import fastest_by_rows, keep
from draftsmith.evaluate.tune.costs import Costs, Probe, TimingPlan, time_cycles
from draftsmith.evaluate.tune.lookup import lookup_speedup, num_lookup_replies
from draftsmith.evaluate.tune.recording import Recorded, record
from draftsmith.evaluate.tune.report import (
    TuneReport,
    best_of_each,
    heat_map,
    outcome_table,
    rows_table,
    tune_json,
    tune_markdown,
)
from draftsmith.evaluate.tune.tune import Grid, weigh
from draftsmith.evaluate.tune.vocabularies import (
    SIZES,
    VocabularyOutcome,
    best_vocabulary,
    labelled_counts,
    weigh_vocabularies,
)
from draftsmith.files import atomic_write, exclusive, sha256_file
from draftsmith.models.composed.refined_drafter import RefinedDrafter
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.files.fingerprint import tokenizer_fingerprint
from draftsmith.models.target.options import DEFAULTS, TargetOptions
from draftsmith.models.target.prompt_template import OWN_TEMPLATE, TemplateChoice
from draftsmith.models.target.target import Target
from draftsmith.models.tree.limits import DraftLimits
from draftsmith.models.tree.shapes import paths_json, shape_text
from draftsmith.ownership import check_unclaimed


@dataclass(frozen=True, kw_only=True)
class VocabularyOptions:
    """Which draft vocabularies are weighed.

    Args:
        vocabularies: Sizes of smaller draft vocabularies; those that are not below the drafter's are left out.
        frequencies: A hidden-state cache; its labelled tokens say which tokens are frequent. Default: the replies, each half judged by
            the other one, which is too little text for large vocabularies.

    Raises:
        ValueError: a size below 1.
    """

    vocabularies: tuple[int, ...] = SIZES
    frequencies: Path | None = None

    def __post_init__(self) -> None:
        if min(self.vocabularies, default=1) < 1:
            raise ValueError(f"vocabularies is {list(self.vocabularies)}; a draft vocabulary has at least 1 token")


@dataclass(frozen=True, kw_only=True)
class RefinementOptions:
    """Which weights of a refined drafter's second opinion are tried with the fastest shape.

    Args:
        alphas: Weights of a refined drafter's second opinion, tried beside its own with the fastest shape; no effect on other drafters.

    Raises:
        ValueError: a weight below 0.
    """

    alphas: tuple[float, ...] = ALPHAS

    def __post_init__(self) -> None:
        if min(self.alphas, default=0.0) < 0.0:
            raise ValueError(f"alphas is {list(self.alphas)}; a weight is at least 0")


@dataclass(frozen=True, kw_only=True)
class TimingOptions:
    """How shapes are recorded and timed.

    Args:
        batch_size: Prompts decoded together where cycles are timed: the batch size to tune for.
        record_batch: Prompts decoded together for the record; changes its speed and memory, not its content.
        rounds: Most timed runs of each shape.
        timing_seconds: Seconds for each number of rows; no round of runs begins that would end later, but one is timed all the same.
        prompt_lookup: Drafted tokens of transformers' prompt lookup, which the fastest shape is compared with; 0 for none. Default: 5
            where batch_size is 1, else 0, as prompt lookup decodes one prompt at a time. Left out where transformers cannot run the
            target so.
        lookup_prompts: Prompts on which prompt lookup is timed.

    Raises:
        ValueError: one of them is below 1, or not above 0 seconds.
    """

    batch_size: int = 1
    record_batch: int = 8
    rounds: int = 7
    timing_seconds: float = 120.0
    prompt_lookup: int | None = None
    lookup_prompts: int = 8

    def __post_init__(self) -> None:
        for name in ("batch_size", "record_batch", "rounds", "lookup_prompts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.timing_seconds > 0:
            raise ValueError(f"timing_seconds is {self.timing_seconds:g}; it must be above 0")
        lookup = self.prompt_lookup or 0
        if lookup < 0 or (lookup and self.batch_size > 1):
            raise ValueError(
                f"prompt_lookup is {lookup} and batch_size {self.batch_size}; it must be at least 0, and above 0 it needs batch_size 1"
            )

    @property
    def lookup_tokens(self) -> int:
        """How many tokens prompt lookup drafts; 0 where it is not timed."""
        if self.prompt_lookup is not None:
            return self.prompt_lookup
        return LOOKUP_TOKENS if self.batch_size == 1 else 0


@dataclass(frozen=True, kw_only=True)
class RowsOptions:
    """For how many rows the fastest shapes are found, and whether they are kept.

    Args:
        rows: Numbers of rows that decode together, for each of which the fastest shape is found.
        keep: Keep these shapes in the drafter's folder, where decode, evaluate, custom_generate and Python find them.

    Raises:
        ValueError: no number of rows, or one below 1.
    """

    rows: tuple[int, ...] = (1, 4, 16)
    keep: bool = True

    def __post_init__(self) -> None:
        if not self.rows or min(self.rows) < 1:
            raise ValueError(f"rows is {list(self.rows)}; give at least one number, each at least 1")


ONE_PROMPT = TimingOptions()
USUAL_ROWS = RowsOptions()
LARGE_VOCABULARIES = VocabularyOptions()
USUAL_ALPHAS = RefinementOptions()
FORTY_PROMPTS = PromptSelection(limit=40)


def tune(
    target: str,
    drafter: str,
    prompts: Path,
    out: Path,
    widths: list[int] | None = None,
    depths: list[int] | None = None,
    nodes: list[int] | None = None,
    draw: Annotated[DrawOptions, FLAT] = GREEDY,
    selection: Annotated[PromptSelection, FLAT] = FORTY_PROMPTS,
    timing: Annotated[TimingOptions, FLAT] = ONE_PROMPT,
    load: Annotated[RowsOptions, FLAT] = USUAL_ROWS,
    vocabulary: Annotated[VocabularyOptions, FLAT] = LARGE_VOCABULARIES,
    refinement: Annotated[RefinementOptions, FLAT] = USUAL_ALPHAS,
    where: Annotated[TargetOptions, FLAT] = DEFAULTS,
    rendering: Annotated[TemplateChoice, FLAT] = OWN_TEMPLATE,
) -> None:
    """Find the draft shape that is fastest with a drafter on this machine.

    The prompts are decoded once, and behind every token the drafter drafts the widest trees. That record shows what any chain, dynamic
    tree or static tree would have emitted a step; timed single cycles show what each would cost. Writes tune.md, tune.json, tune.png,
    the best static trees as static-NODES.json for `tree:FILE.json`, and shapes_by_rows.json into the drafter's folder.

    Args:
        target: Directory or hub id of the target, or embedded:target.
        drafter: The drafter, as for `draftsmith evaluate`: a folder, or NAME=PATH.
        prompts: Held-out prompts: JSONL file or folder of `draftsmith data prompts`, or JSONL rows with prompt_ids.
        out: Folder for the result.
        widths: Nodes continued in each layer; 1 weighs chains. Default 1 2 4 8.
        depths: Drafted tokens along one path; those that the drafter has no heads for are left out. Default 2 3 4 5 6 8.
        nodes: Verified nodes of a tree. Default 4 8 12 16 24 32 48.
        draw: Length, seed and temperature of the replies; see `DrawOptions`.
        selection: Which prompts; see `PromptSelection`.
        timing: How shapes are timed; see `TimingOptions`.
        load: For how many rows shapes are found; see `RowsOptions`.
        vocabulary: Which draft vocabularies are weighed; see `VocabularyOptions`.
        refinement: Which weights a refined drafter is tried with; see `RefinementOptions`.
        where: Where the target runs; see `TargetOptions`.
        rendering: The chat template; see `TemplateChoice`.

    Raises:
        ValueError: the drafter's word names shapes, files or settings do not belong together, or a folder would be overwritten.
    """
    check_unclaimed(out, ("tune.md", "tune.json", "tune.png"))
    grid, entry = _grid(widths, depths, nodes), _entry(drafter)
    where = where.resolved(target)
    tokenizer = where.tokenizer(target)
    samples = selected_samples(prompts, target, tokenizer, selection, rendering, where)
    model = where.load_to_decode(target)
    samples = readable_by(model, samples)
    [candidate] = load_candidates([entry], model, tokenizer_fingerprint(tokenizer), where.trust_remote_code)
    grid = _grid_of(model, grid.no_deeper_than(candidate.drafter.max_draft_steps), is_asked=widths is not None)
    settings = for_target(settings_of(draw, eos_token_ids=model.eos_token_ids), model)
    inputs = _prompts_file(prompts) | {target: model.fingerprint, str(entry.path): candidate.fingerprint}
    config = _fields(settings, grid, timing, load, vocabulary, refinement, selection, where, rendering)
    with exclusive(out):
        report = _tuned(out, model, candidate, samples, settings, grid, timing, load.rows, vocabulary, refinement)
        report = replace(report, kept=_keep(report, model, candidate, entry.path, drafter) if load.keep else "")
        _write(out, report, provenance.record(provenance.command_line(), config, inputs))
    _print_fastest(report, out / "tune.md")


def _grid(widths: list[int] | None, depths: list[int] | None, nodes: list[int] | None) -> Grid:
    return Grid(
        tuple(widths or (1, 2, 4, 8)), tuple(depths or (2, 3, 4, 5, 6, 8)), tuple(nodes or (4, 8, 12, 16, 24, 32, 48))
    )


def _grid_of(target: Target, grid: Grid, is_asked: bool) -> Grid:
    """The grid, or its chains where the target can follow nothing else; says so.

    Args:
        target: decodes.
        grid: as asked for.
        is_asked: whether its widths were named.

    Raises:
        ValueError: trees were named, and the target cannot follow them.
    """
    if not target.keeps_state:
        return grid
    if is_asked and grid.widths != (1,):
        raise ValueError(
            f"widths is {list(grid.widths)}, but {target.name} keeps a recurrent state, which follows one branch only; weigh chains with "
            "--widths 1"
        )
    print(
        visible(f"{target.name} keeps a recurrent state, which follows one branch only: chains are weighed, no trees")
    )
    return grid.of_chains()


def _prompts_file(prompts: Path) -> dict[str, str]:
    """The file that prompts are read from, with its fingerprint."""
    file = prompts / PROMPT_FILE if prompts.is_dir() else prompts
    return {str(file): sha256_file(file)}


def _fields(*options: Any) -> dict[str, Any]:
    return {name: value for each in options for name, value in asdict(each).items()}


def _entry(drafter: str) -> Entry:
    """The one drafter.

    Raises:
        ValueError: shapes are named too.
    """
    if "@" in drafter:
        raise ValueError(f"drafter {drafter!r} names shapes, which tune is to find; leave out what follows the @")
    [entry] = parse_entries([drafter], ["1x1"])
    return entry


def _tuned(
    out: Path,
    target: Target,
    candidate: Candidate,
    samples: Sequence[Sample],
    settings: GenerationSettings,
    grid: Grid,
    timing: TimingOptions,
    rows: Sequence[int],
    vocabulary: VocabularyOptions,
    refinement: RefinementOptions,
) -> TuneReport:
    """Records the replies, times every shape of the grid, and weighs them, also by rows; writes the static trees."""
    drafter = candidate.drafter
    with progress("record", len(samples), "replies") as advance:
        replies = record(target, drafter, samples, settings, grid.widths, grid.depth, timing.record_batch, advance)
    dynamic, static = grid.shapes(), grid.static_shapes(replies)
    text = typical_text(replies, target.max_positions)
    rounds: dict[int, int] = {}

    @cache
    def costs_of(num_rows: int, shapes: tuple[DraftLimits, ...]) -> Costs:
        plan = TimingPlan.of(shapes)
        probe = Probe(text, num_rows, rounds=timing.rounds, most_seconds=timing.timing_seconds)
        title = f"time {num_rows} rows" if num_rows > 1 else "time 1 row"
        with metered(title, plan.num_runs(probe), "runs") as meter:
            clocked = time_cycles(target, drafter, plan, probe, meter.advance, meter.forgo)
        rounds[num_rows] = min(clocked.rounds, rounds.get(num_rows, clocked.rounds))
        return clocked

    costs = costs_of(timing.batch_size, (*dynamic, *static))
    by_rows = fastest_by_rows(rows, replies, dynamic, static, costs_of)
    refusal = lookup_refusal(target) if timing.lookup_tokens else ""
    lookup = _timed_lookup(target, samples[: timing.lookup_prompts], settings, 0 if refusal else timing.lookup_tokens)
    setting = {
        "prompts": len(replies),
        "tokens": sum(len(reply.token_ids) for reply in replies),
        "temperature": settings.temperature,
        "batch size": timing.batch_size,
        "context of the timed cycles": len(text),
        "timed runs of each shape": rounds_text(rounds),
        "dtype": str(target.dtype).removeprefix("torch."),
        "device": str(target.device),
    }
    files = _write_trees(out, static)
    outcomes = weigh(replies, dynamic, static, costs)
    best = next(limits for limits in (*dynamic, *static) if shape_text(limits) == outcomes[0].shape)
    return TuneReport(
        target.name,
        candidate.name,
        setting,
        outcomes,
        costs,
        files,
        lookup,
        by_rows,
        vocabularies=_vocabularies(target, drafter, replies, best, costs, vocabulary),
        alphas=_alphas(best, target, drafter, samples, settings, grid, timing, refinement),
        left_out=refusal,
    )


def rounds_text(rounds: Mapping[int, int]) -> int | str:
    """How many runs of each shape were timed: a number, or words where it differs by the number of rows.

    Args:
        rounds: number of rows -> timed runs.

    Example:
        5 runs with 1 row and 2 with 16 give `5 with 1 row; 2 with 16 rows`.
    """
    if len(set(rounds.values())) == 1:
        return next(iter(rounds.values()))
    return "; ".join(f"{rounds[count]} with {count} row{'s' if count > 1 else ''}" for count in sorted(rounds))


def _alphas(
    limits: DraftLimits,
    target: Target,
    drafter: Drafter,
    samples: Sequence[Sample],
    settings: GenerationSettings,
    grid: Grid,
    timing: TimingOptions,
    options: RefinementOptions,
) -> list[AlphaOutcome]:
    """The weights of a refined drafter with the fastest shape; none of others."""
    drafter = drafter.bound(target.ends)
    if not isinstance(drafter, RefinedDrafter) or not options.alphas:
        return []
    num_tried = len({*options.alphas, float(drafter.config.alpha)})
    with progress("alphas", len(samples) * num_tried, "replies") as advance:
        return weigh_alphas(
            target, drafter, samples, settings, limits, options.alphas, max(grid.widths), timing.record_batch, advance
        )


def _keep(report: TuneReport, target: Target, candidate: Candidate, folder: Path, word: str) -> str:
    """Keep the shapes in the drafter's folder; what became of it, in words."""
    return keep(report.by_rows, target, folder, is_folder_of_the_caller(word), candidate.drafter.drafts_from())


def is_folder_of_the_caller(word: str) -> bool:
    """Whether a drafter was named by its folder, not as an embedded model or by a hub id."""
    return Path(word.partition("=")[2] or word).is_dir()


def _vocabularies(
    target: Target,
    drafter: Drafter,
    replies: Sequence[Recorded],
    limits: DraftLimits,
    costs: Costs,
    options: VocabularyOptions,
) -> list[VocabularyOutcome]:
    """The draft vocabularies with the fastest shape; none of a drafter that is made of others, which has no output head of its own."""
    if not drafter.config.vocab_size:
        return []
    counts_V = None
    if options.frequencies is not None:
        cache = HiddenStateCache(options.frequencies, check="off")
        cache.check_target(target.fingerprint, vocab_size=drafter.config.vocab_size)
        counts_V = labelled_counts(cache, drafter.config.vocab_size)
    return weigh_vocabularies(replies, drafter.bound(target.ends), limits, costs, options.vocabularies, counts_V)


def _timed_lookup(
    target: Target, samples: Sequence[Sample], settings: GenerationSettings, num_tokens: int
) -> float | None:
    """The speed-up of prompt lookup over plain decoding; None where it is not asked for."""
    if not num_tokens:
        return None
    with progress("prompt lookup", num_lookup_replies(samples), "replies") as advance:
        return lookup_speedup(target, samples, settings, num_tokens, advance)


def _print_fastest(report: TuneReport, page: Path) -> None:
    print(outcome_table(report, best_of_each(report.outcomes)))
    best = report.best
    print(
        f"\nfastest: --shapes {report.word(best)}  (predicted {best.speedup:.2f}, {best.tokens_per_step:.2f} tokens per step)"
    )
    print(f"\n{rows_table(report)}\n")
    for line in filter(None, (report.kept, report.left_out)):
        print(visible(line))
    if len(report.vocabularies) > 1:
        print(best_vocabulary(report.vocabularies))
    if report.alphas:
        print(best_alpha(report.alphas))
    for line in slow_shapes(best.speedup, report.lookup):
        print(line)
    print(f"report: {page}")


def typical_text(replies: Sequence[Recorded], longest: int | None, room: int = 32) -> tuple[int, ...]:
    """Half way through the reply of median length, prompt included, as far as the context leaves `room` for timed tokens."""
    chosen = sorted(replies, key=lambda reply: len(reply.prompt_ids) + len(reply.token_ids) / 2)[len(replies) // 2]
    text = chosen.prompt_ids + chosen.token_ids[: len(chosen.token_ids) // 2]
    return text if longest is None else text[: max(1, longest - room)]


def _write_trees(out: Path, static: Sequence[DraftLimits]) -> dict[str, str]:
    """Shape text -> file."""
    files = {}
    for limits in static:
        paths = limits.paths or ()
        path = out / f"static-{len(paths)}.json"
        atomic_write(path, paths_json(paths))
        files[shape_text(limits)] = str(path)
    return files


def _write(out: Path, report: TuneReport, made_by: dict) -> None:
    provenance.write(out, made_by)
    atomic_write(out / "tune.png", heat_map(report.outcomes))
    atomic_write(out / "tune.md", tune_markdown(report, made_by))
    atomic_write(out / "tune.json", tune_json(report, made_by) + "\n")

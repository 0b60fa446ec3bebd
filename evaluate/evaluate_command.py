"""`draftsmith evaluate`: one target, its prompts, its drafters; a report of what they gain.

Owns the order of the work: load, refuse, race, report. Does not know the measures' definitions or the files' formats.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch

from draftsmith import provenance
from draftsmith.arguments import FLAT, WHOLE
from draftsmith.data.progress import progress
from draftsmith.data.prompts import ALL_PROMPTS, PROMPT_FILE, PromptSelection
from draftsmith.decode import GenerationSettings
from draftsmith.decode.model_settings import for_target
from draftsmith.decode.sampling import NO_FILTERS, FilterOptions, ReplyOptions, settings_of
from draftsmith.escapes import visible
from draftsmith.evaluate.chart import draw, draw_rooflines
from draftsmith.evaluate.drafters import Entry, parse_entries
from draftsmith.evaluate.measure import ONE_RUN, Candidate, Plan, all_turns, measure
from draftsmith.evaluate.records import Row, Sample
from draftsmith.evaluate.report import (
    CHARTS,
    REPORTS,
    labelled_rooflines,
    main_table,
    named_bins,
    named_categories,
    write_report,
    write_scalars,
)
from draftsmith.evaluate.resume import parts
from draftsmith.evaluate.roofline.memory_speed import memory_speed
from draftsmith.evaluate.roofline.words import roofline_text
from draftsmith.evaluate.samples import Questions, readable_by, selected_questions
from draftsmith.evaluate.slow_drafters import slow_drafters
from draftsmith.evaluate.strata_chart import draw_categories, draw_contexts
from draftsmith.files import atomic_directory, exclusive, sha256_file
from draftsmith.models.branches import check_branches, default_for
from draftsmith.models.drafters.drafter_folder import drafter_fingerprint, load_drafter
from draftsmith.models.drafters.other_layouts import TargetBond
from draftsmith.models.drafters.registry import default_limits
from draftsmith.models.files.fingerprint import module_fingerprint, tokenizer_fingerprint
from draftsmith.models.target.options import DEFAULTS, TargetOptions
from draftsmith.models.target.prompt_template import OWN_TEMPLATE, TemplateChoice
from draftsmith.models.target.target import Target
from draftsmith.models.tree.limits import DraftLimits
from draftsmith.models.tree.shapes_by_rows import ShapesByRows, as_shapes
from draftsmith.ownership import check_replaceable, check_unclaimed

STAGE = "draftsmith evaluate"
TENSORBOARD = "tensorboard"
REPORT = "report.json"
LEFT_OUT = "left_out"
REPLY = ReplyOptions()


def evaluate(
    target: str,
    prompts: Path,
    out: Path,
    drafters: Annotated[list[str] | None, WHOLE] = None,
    shapes: list[str] | None = None,
    temperatures: list[float] | None = None,
    reply: Annotated[ReplyOptions, FLAT] = REPLY,
    filters: Annotated[FilterOptions, FLAT] = NO_FILTERS,
    selection: Annotated[PromptSelection, FLAT] = ALL_PROMPTS,
    plan: Annotated[Plan, FLAT] = ONE_RUN,
    where: Annotated[TargetOptions, FLAT] = DEFAULTS,
    rendering: Annotated[TemplateChoice, FLAT] = OWN_TEMPLATE,
) -> None:
    """Measure what drafters gain on a target, and whether its replies stay the same.

    Plain decoding and every drafter decode a prompt before the next prompt comes, so that all meet the same machine. Writes report.md,
    report.json, report.png, roofline.png and TensorBoard scalars. To resume a killed run, repeat the command.

    Args:
        target: Directory or hub id of the target, or embedded:target.
        prompts: JSONL file or folder of `draftsmith data prompts`, a file of Spec-Bench or SPEED-Bench (JSONL or Parquet), or JSONL rows
            with prompt_ids.
        out: Folder for the report.
        drafters: Folders or hub ids of drafters or draft LMs, or embedded:suffix; NAME=PATH names one, PATH@1x4,10x4 gives it its own
            shapes.
        shapes: Shapes for the others: WIDTHxLENGTH beams with LENGTH drafted tokens, 10x6n60 a dynamic tree (m2 behind it merges
            branches), tree:FILE.json or t3.2.1 a static one, s1.1.1, k4.2.1 or b1.1.1 a sampled one; p0.1 prunes, e0.5 stops early.
            Default: what `draftsmith tune` kept in the drafter's folder, else the family's own, else 1x4.
        temperatures: One row each; 0 is greedy. Default 0.
        reply: Length and seed; see `ReplyOptions`.
        filters: Which tokens can be drawn; see `FilterOptions`.
        selection: Which prompts; see `PromptSelection`.
        plan: How much is measured; see `Plan`.
        where: Where the target runs; see `TargetOptions`.
        rendering: The chat template; see `TemplateChoice`.
    """
    check_unclaimed(out, (*REPORTS, *CHARTS))
    check_replaceable(out / TENSORBOARD, STAGE)
    settings = settings_of(reply, filters)
    entries = parse_entries(drafters or [], shapes)
    where = where.resolved(target)
    tokenizer = where.tokenizer(target)
    questions = selected_questions(prompts, target, tokenizer, selection, rendering, where, plan.max_turns)
    model = where.load_to_decode(target)
    settings = for_target(settings, model)
    by_temperature = [
        replace(settings, temperature=value) for value in ([0.0] if temperatures is None else temperatures)
    ]
    questions = replace(questions, samples=readable_by(model, questions.samples))
    candidates = load_candidates(entries, model, tokenizer_fingerprint(tokenizer), where.trust_remote_code)
    plan, left_out = plan.runnable_with(model)
    config = asdict(settings) | asdict(plan) | {"temperatures": [each.temperature for each in by_temperature]}
    config |= {"round_prompts": plan.round_prompts(questions.num_turns)}
    config |= {"drafters": [asdict(entry) for entry in entries], "split": selection.split}
    config |= asdict(where) | asdict(rendering) | {LEFT_OUT: left_out}
    inputs = _inputs(prompts, model, entries)
    record = partial(provenance.record, provenance.command_line(), config, inputs)
    _print(_measured(out, model, questions, candidates, by_temperature, plan, record), left_out)
    print(f"report: {out / 'report.md'}")


def _print(rows: Sequence[Row], left_out: Sequence[str]) -> None:
    print(main_table(rows))
    for line in left_out:
        print(visible(line))
    for line in slow_drafters(rows):
        print(line)
    if text := roofline_text(labelled_rooflines(rows)):
        print(f"\n{text}\n")


def _inputs(prompts: Path, target: Target, entries: Sequence[Entry]) -> dict[str, str]:
    """What is read, by name or path, each with its fingerprint."""
    file = prompts / PROMPT_FILE if prompts.is_dir() else prompts
    drafters = {str(entry.path): drafter_fingerprint(entry.path) for entry in entries}
    return {str(file): sha256_file(file), target.name: target.fingerprint} | drafters


def _measured(
    out: Path,
    target: Target,
    questions: Questions,
    candidates: Sequence[Candidate],
    by_temperature: Sequence[GenerationSettings],
    plan: Plan,
    record: Callable[[], dict[str, Any]],
) -> list[Row]:
    """Rows of all temperatures, each taken up where an earlier run stopped; written as reports."""
    facts = identity(record(), questions.samples, candidates)
    facts |= {"conversations": [prompt.fields() for prompt in questions.conversations.values()]}
    temperatures = [settings.temperature for settings in by_temperature]
    measurements = [
        facts | {"temperature": value, "repeated": temperatures[:index].count(value)}
        for index, value in enumerate(temperatures)
    ]
    with exclusive(out), parts(out, measurements) as unfinished:
        _announce_replaced(out)
        speed = memory_speed(target.device)
        rows: list[Row] = []
        for settings, part in zip(by_temperature, unfinished, strict=True):
            ending = replace(settings, eos_token_ids=target.eos_token_ids)
            samples = all_turns(target, questions, ending, plan, part)
            rows += measure(target, samples, candidates, ending, plan, part, speed)
        _write(out, rows, record())
    return rows


def load_candidates(
    entries: Sequence[Entry], target: Target, tokenizer: str, trust_remote_code: bool = False
) -> list[Candidate]:
    """Every drafter with every shape, on the target's device and attached to it.

    Raises:
        ValueError: a drafter is of another target or another tokenizer (by fingerprint) or does not load whole, or a shape is deeper
            than the drafter can draft, or a tree that the target cannot follow.
    """
    candidates = []
    dtype, bond = str(target.dtype).removeprefix("torch."), TargetBond(target.ends, tokenizer)
    for entry in entries:
        drafter = load_drafter(entry.path, dtype, trust_remote_code, target=bond)
        drafter.attach(target.ends)
        drafter.check_tokenizer(tokenizer)
        with progress(f"hash the weights of {entry.name}", 1, "drafters", brief=True):
            # A drafter made of others drafts from tables as well: a shared pool, n-grams.
            fingerprint = module_fingerprint(drafter, with_tables=drafter.parts is not None)
        drafter.to_decode(target.device)
        shapes: Sequence[DraftLimits | ShapesByRows] = entry.shapes
        if not shapes:
            by_default = default_limits(drafter, DraftLimits(draft_length=4))
            shapes = [drafter.kept_shapes(target) or default_for(target, by_default)]
        for limits in shapes:
            check_branches(target, as_shapes(limits).drafted)
            for shape in as_shapes(limits).drafted:
                drafter.check_depth(shape)
        candidates += [Candidate(entry.name, drafter, limits, fingerprint) for limits in shapes]
    return candidates


def identity(record: Mapping[str, Any], samples: Sequence[Sample], candidates: Sequence[Candidate]) -> dict[str, Any]:
    """All that replies and times depend on but the temperature: two runs may share their measurements where this is equal.

    Args:
        record: the run's provenance, of which the command's wording, the time and the other temperatures do not count.
        samples: the prompts.
        candidates: the drafters with their shapes.
    """
    facts = {name: value for name, value in record.items() if name not in ("command", "time", "config")}
    facts |= {name: value for name, value in record["config"].items() if name not in ("temperature", "temperatures")}
    drafters = [[each.label, each.fingerprint, each.drafter.config.to_json_string()] for each in candidates]
    prompts = [asdict(sample) for sample in samples]
    return facts | {"samples": prompts, "candidates": drafters, "threads": torch.get_num_threads()}


def _announce_replaced(out: Path) -> None:
    report = out / REPORT
    if not report.is_file():
        return
    try:
        rows = json.loads(report.read_bytes())["rows"]
        held = ", ".join(dict.fromkeys(f"T={row['temperature']:g}" for row in rows))
    except (ValueError, KeyError, TypeError):
        held = "unreadable"
    print(f"{report} of an earlier evaluation ({held}) will be replaced; to keep it, stop and give another --out")


def _write(out: Path, rows: Sequence[Row], made_by: dict) -> None:
    with atomic_directory(out / TENSORBOARD, STAGE) as folder:
        write_scalars(folder, rows)
        provenance.write(folder, made_by)
    provenance.write(out, made_by)
    charts = draw(rows), draw_rooflines(rows), draw_categories(named_categories(rows)), draw_contexts(named_bins(rows))
    facts = made_by["command"], made_by["machine"], made_by["versions"]
    write_report(out, *facts, rows, *charts, left_out=made_by["config"][LEFT_OUT])

"""`draftsmith judge evaluate`: what a judge and its rivals gain, and what they cost in right answers.

Owns the order of the work and its files. Does not know the measures' definitions or how rules decide.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from draftsmith import provenance
from draftsmith.arguments import FLAT
from draftsmith.data.prompts import ALL_PROMPTS, PromptSelection
from draftsmith.decode.runners import Compile, check_compile
from draftsmith.decode.sampling import DrawOptions
from draftsmith.decode.verify.rule_text import parse_rule
from draftsmith.evaluate.drafters import names_apart
from draftsmith.evaluate.lossy.chart import draw_trade
from draftsmith.evaluate.lossy.contest import Contest, prepare
from draftsmith.evaluate.lossy.kept_answers import HEAD, KeptAnswers, kept_answers
from draftsmith.evaluate.lossy.lossy import LOSSLESS, PLAIN, Ruled, RuleRow, compare
from draftsmith.evaluate.lossy.price import PRICE_CHART, draw_prices, price_table, prices
from draftsmith.evaluate.lossy.report import to_markdown, trade_table
from draftsmith.evaluate.lossy.wrong_tokens import Accepted, accepted_tokens
from draftsmith.evaluate.report import REPORTS
from draftsmith.evaluate.resume import WORK_FILE
from draftsmith.files import atomic_write, exclusive
from draftsmith.label.checkers.checkers import load_checker
from draftsmith.label.token_rows import read_rows
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.files.fingerprint import tokenizer_fingerprint
from draftsmith.models.target.options import DEFAULTS, TargetOptions
from draftsmith.models.target.prompt_template import OWN_TEMPLATE, TemplateChoice
from draftsmith.models.target.target import Target
from draftsmith.models.tree.limits import DraftLimits
from draftsmith.models.tree.shapes import parse_shape
from draftsmith.ownership import check_begun, check_unclaimed

_JUDGE = "judge:"


@dataclass(frozen=True, kw_only=True)
class WorkloadOptions:
    """How many problems are answered together, and how many are timed.

    Args:
        batch_rows: Problems answered together, except for the race.
        timed_problems: Problems decoded once more, one at a time, by all rules in turn, for the speed-up; 0 for no speed-up.
        compile: on compiles what is timed, plain decoding too (on CUDA it captures cycles), off runs it op by op; auto is off so far.
            Compiling a long chain takes minutes for each rule.

    Raises:
        ValueError: a count is too low, or `compile` is unknown.
    """

    batch_rows: int = 32
    timed_problems: int = 40
    compile: Compile = "auto"

    def __post_init__(self) -> None:
        check_compile(self.compile)
        for name, least in (("batch_rows", 1), ("timed_problems", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")


WORKLOAD = WorkloadOptions()
LONG_ANSWERS = DrawOptions(max_new_tokens=256)


def evaluate_rules(
    target: str,
    drafter: str,
    prompts: Path,
    checker: str,
    rules: list[str],
    out: Path,
    shape: str = "1x16",
    labelled_rows: Path | None = None,
    most_lost: float = 1.0,
    draw: Annotated[DrawOptions, FLAT] = LONG_ANSWERS,
    selection: Annotated[PromptSelection, FLAT] = ALL_PROMPTS,
    workload: Annotated[WorkloadOptions, FLAT] = WORKLOAD,
    where: Annotated[TargetOptions, FLAT] = DEFAULTS,
    rendering: Annotated[TemplateChoice, FLAT] = OWN_TEMPLATE,
) -> None:
    """Compare LOSSY rules of acceptance: right answers, accepted tokens, target forwards and speed, each with its interval.

    Plain decoding is the first row, which accuracy is compared with. Writes report.md, report.json, report.png and price.png. Name several
    settings of a rule (kl@1 kl@3) to see what it gains at equal quality. To resume a killed run, repeat the command: what was answered is
    neither decoded nor checked again.

    Args:
        target: Directory or hub id of the target, or embedded:target.
        drafter: Folder of a trained drafter, or a draft LM.
        prompts: JSONL file of problems with their reference answers.
        checker: What judges whether an answer is right, as in `draftsmith label generate`.
        rules: lossless, judge:FOLDER[@0.9], top-k@3, typical@0.09, kl@0.5, kl-unsure@0.5, ensemble@0.7, fly@0.3,
            margin@0.3, relaxed:BEGIN,END@0.5 (the ids of the tokens around a thought), everything; NAME=RULE names one.
        out: Folder for the report.
        shape: How much to draft: long chains such as 1x16 pay here; e0.5 behind it stops early.
        labelled_rows: Rows of `draftsmith label rows` that no judge was trained on: counts the wrong tokens that each rule accepts.
        most_lost: Points of right answers that a rule may lose where the report compares rules at equal quality.
        draw: Length, seed and temperature of the answers; see `DrawOptions`.
        selection: Which problems; see `PromptSelection`.
        workload: How many problems are answered together and timed; see `WorkloadOptions`.
        where: Where the target runs; see `TargetOptions`.
        rendering: The chat template; see `TemplateChoice`.

    Raises:
        ValueError: settings out of range, rules that cannot decode, or problems that the checker cannot judge.
    """
    if not 0.0 <= most_lost < 100.0:
        raise ValueError(f"most_lost is {most_lost}; give points of right answers, from 0 on and below 100")
    check_unclaimed(out, (*REPORTS, PRICE_CHART))
    check_begun(out / WORK_FILE, HEAD)
    chosen, limits = _ruled(rules), parse_shape(shape)
    where = where.resolved(target)
    contest = prepare(target, drafter, prompts, load_checker(checker), draw, selection, where, rendering)
    _check_tokenizers(chosen, tokenizer_fingerprint(contest.tokenizer))
    config = asdict(contest.settings) | {"shape": shape, "rules": rules, "checker": checker}
    config |= asdict(where) | asdict(rendering) | asdict(workload)
    with exclusive(out), kept_answers(out / WORK_FILE, contest.facts, judged=True) as kept:
        rows = _compared(contest, limits, chosen, workload, labelled_rows, kept)
        made_by = provenance.record(provenance.command_line(), config, dict(contest.inputs))
        _write(out, rows, made_by, target, drafter, workload, most_lost / 100)
    priced = price_table(prices(rows, most_lost / 100), most_lost / 100)
    print(f"{trade_table(rows)}\n\n{priced}\nreport: {out / 'report.md'}")


def _compared(
    contest: Contest,
    limits: DraftLimits,
    rules: Sequence[Ruled],
    workload: WorkloadOptions,
    labelled_rows: Path | None,
    kept: KeptAnswers,
) -> list[RuleRow]:
    """The rows of plain decoding and of every rule."""
    assert contest.is_right is not None, "there is a checker"
    return compare(
        contest.target,
        contest.drafter,
        limits,
        rules,
        contest.samples,
        contest.is_right,
        contest.text_of,
        contest.settings,
        timed_problems=min(workload.timed_problems, len(contest.samples)),
        batch_rows=workload.batch_rows,
        compile=workload.compile,
        wrong_tokens=_wrong_tokens(contest.target, contest.drafter, rules, labelled_rows),
        kept=kept,
    )


def _check_tokenizers(rules: Sequence[Ruled], tokenizer: str) -> None:
    """Stops with an error at a judge of another tokenizer than the target's, which is given by its fingerprint."""
    for each in rules:
        if each.rule is not None:
            each.rule.check_tokenizer(tokenizer)


def _wrong_tokens(
    target: Target, drafter: Drafter, rules: Sequence[Ruled], labelled_rows: Path | None
) -> dict[str, Accepted | None]:
    """By each rule's label, the shares of right and wrong labelled tokens that it accepts; empty without labelled rows."""
    if labelled_rows is None:
        return {}
    shares = accepted_tokens(target, drafter, [each.rule for each in rules], list(read_rows(labelled_rows)))
    return {each.label: share for each, share in zip(rules, shares, strict=True)}


def _ruled(texts: Sequence[str]) -> list[Ruled]:
    """The rules, with names of their own for several judges that were given none."""
    folders = {
        text: text.removeprefix(_JUDGE).rpartition("@")[0] or text.removeprefix(_JUDGE)
        for text in texts
        if text.startswith(_JUDGE)
    }
    unlike = list(dict.fromkeys(folders.values()))
    names = dict(zip(unlike, names_apart(unlike), strict=True)) if len(unlike) > 1 else {}
    parsed = [(text, *parse_rule(text)) for text in texts]
    ruled = [
        Ruled(f"{name} {names[folders[text]]}" if folders.get(text) in names else name, rule)
        for text, name, rule in parsed
    ]
    _check_names(ruled)
    return ruled


def _check_names(rules: Sequence[Ruled]) -> None:
    """Stops with an error at a rule with the name of a row that is not lossy, and at two rules of one name."""
    for each in rules:
        if each.name == PLAIN or (each.name == LOSSLESS and each.rule is not None):
            raise ValueError(
                f"a rule is named {each.name!r}, which is the name of a row that is not lossy; give another NAME=RULE"
            )
    labels = [each.label for each in rules]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"rule {label!r} is there twice; name the rules apart with NAME=RULE")


def _write(
    out: Path,
    rows: Sequence[RuleRow],
    made_by: dict[str, Any],
    target: str,
    drafter: str,
    workload: WorkloadOptions,
    most_lost: float,
) -> None:
    provenance.write(out, made_by)
    facts = {key: made_by[key] for key in ("command", "machine", "versions")}
    facts |= {"timed_problems": workload.timed_problems, "compile": workload.compile}
    report = facts | {"target": target, "drafter": drafter, "rows": [row.to_json() for row in rows]}
    atomic_write(out / "report.png", draw_trade(rows))
    priced = prices(rows, most_lost)
    if priced:
        atomic_write(out / PRICE_CHART, draw_prices(priced, rows, most_lost))
    else:
        (out / PRICE_CHART).unlink(missing_ok=True)
    atomic_write(out / "report.md", to_markdown(facts, target, drafter, rows, most_lost))
    atomic_write(out / "report.json", json.dumps(report, indent=1, allow_nan=False) + "\n")

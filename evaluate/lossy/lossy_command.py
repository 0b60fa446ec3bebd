"""`draftsmith judge evaluate`: what a judge and its rivals gain, and what they cost in right answers.

Owns the order of the work and its files. Does not know the measures' definitions or how rules decide.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from torch import nn

from draftsmith import provenance
from draftsmith.arguments import FLAT
from draftsmith.data.formats import row_id
from draftsmith.data.prompts import PROMPT_FILE
from draftsmith.decode import GenerationSettings
from draftsmith.decode.model_settings import for_target
from draftsmith.decode.verify.rule_text import parse_rule
from draftsmith.evaluate.drafters import names_apart
from draftsmith.evaluate.lossy.chart import draw_trade
from draftsmith.evaluate.lossy.lossy import LOSSLESS, PLAIN, Ruled, RuleRow, compare
from draftsmith.evaluate.lossy.report import to_markdown, trade_table
from draftsmith.evaluate.lossy.wrong_tokens import Accepted, accepted_tokens
from draftsmith.evaluate.records import Sample
from draftsmith.evaluate.report import REPORTS
from draftsmith.evaluate.samples import read_samples, readable_by
from draftsmith.files import atomic_write, exclusive, read_jsonl, sha256_file
from draftsmith.json_rows import UnusableRow
from draftsmith.label.checkers.checkers import Checker, load_checker
from draftsmith.label.token_rows import read_rows
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.drafter_folder import drafter_folder, load_drafter
from draftsmith.models.files.end_tokens import read_end_tokens
from draftsmith.models.files.fingerprint import tokenizer_fingerprint
from draftsmith.models.files.loading import load_tokenizer
from draftsmith.models.target.options import DEFAULTS, TargetOptions
from draftsmith.models.target.prompt_template import NO_OPTIONS, TemplateOptions
from draftsmith.models.target.target import Target
from draftsmith.models.tree.shapes import parse_shape
from draftsmith.ownership import check_unclaimed

_JUDGE = "judge:"


def evaluate_rules(
    target: str,
    drafter: str,
    prompts: Path,
    checker: str,
    rules: list[str],
    out: Path,
    shape: str = "1x16",
    labelled_rows: Path | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    max_new_tokens: int = 256,
    limit: int | None = None,
    split: str | None = None,
    template: str | None = None,
    batch_rows: int = 32,
    timed_problems: int = 40,
    dtype: str = "float32",
    where: Annotated[TargetOptions, FLAT] = DEFAULTS,
    rendering: Annotated[TemplateOptions, FLAT] = NO_OPTIONS,
) -> None:
    """Compare LOSSY rules of acceptance: right answers, accepted tokens, target forwards and speed, each with its interval.

    Plain decoding is always the first row, and its answers are what accuracy is compared with. Writes report.md, report.json and
    report.png.

    Args:
        target: Directory or hub id of the target, or embedded:target.
        drafter: Folder of a trained drafter, or a draft LM.
        prompts: JSONL file of problems with their reference answers.
        checker: What says whether an answer is right, as in `draftsmith label generate`.
        rules: lossless, judge:FOLDER, judge:FOLDER@0.9, top-k@3, typical@0.09, kl@0.5, everything; NAME=RULE names one.
        out: Folder for the report.
        shape: How much to draft: long chains such as 1x16 pay here; e0.5 behind it stops early.
        labelled_rows: Rows of `draftsmith label rows` of other questions than the judges were trained on: the share of wrong tokens that
            each rule accepts is counted on them.
        temperature: 0 is greedy.
        seed: Of the sampling noise.
        max_new_tokens: Longest answer.
        limit: Only the first so many problems.
        split: Only this split of the prompts.
        template: Chat template file where the tokenizer has none, or "none".
        batch_rows: Problems answered together, except for the race.
        timed_problems: Problems decoded once more, one at a time, by all rules in turn, for the speed-up.
        dtype: float32, bfloat16 or float16.
        where: The target's devices, revision, adapter and quantization; see `TargetOptions`.
        rendering: The chat template's name and variables; see `TemplateOptions`.
    """
    check_unclaimed(out, REPORTS)
    chosen = _ruled(rules)
    limits = parse_shape(shape)
    draft_folder = drafter_folder(drafter)
    _check(chosen, batch_rows, timed_problems)
    file = prompts / PROMPT_FILE if prompts.is_dir() else prompts
    judged = load_checker(checker)
    tokenizer = load_tokenizer(target, where.revision, where.trust_remote_code)
    ends = read_end_tokens(target, where.revision, tokenizer, where.trust_remote_code)
    samples = read_samples(prompts, tokenizer, template, split, limit, ends, rendering)
    questions = _questions(file, samples, judged)
    model = where.load(target, dtype)
    samples = readable_by(model, samples)
    own_tokenizer = tokenizer_fingerprint(tokenizer)
    for one in chosen:
        if one.rule is not None:
            one.rule.check_tokenizer(own_tokenizer)
    draft = _drafter(draft_folder, model, own_tokenizer, where.trust_remote_code)
    settings = GenerationSettings(max_new_tokens, temperature, seed=seed, eos_token_ids=model.eos_token_ids)
    settings = for_target(settings, model)
    with exclusive(out):
        accepted: dict[str, Accepted | None] = {}
        if labelled_rows is not None:
            found = accepted_tokens(model, draft, [one.rule for one in chosen], list(read_rows(labelled_rows)))
            accepted = {one.label: shares for one, shares in zip(chosen, found, strict=True)}
        rows = compare(
            model,
            draft,
            limits,
            chosen,
            samples,
            lambda number, text: judged.check(questions[samples[number].id], text).verdict == "correct",
            lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True)),
            settings,
            timed_problems=min(timed_problems, len(samples)),
            batch_rows=batch_rows,
            wrong_tokens=accepted,
        )
        config = asdict(settings) | {"shape": shape, "rules": rules, "checker": checker, "dtype": dtype} | asdict(where)
        config |= {"template": template} | asdict(rendering)
        inputs = {str(file): sha256_file(file), target: model.fingerprint}
        _write(out, rows, provenance.record(provenance.command_line(), config, inputs), target, drafter)
    print(trade_table(rows))
    print(f"report: {out / 'report.md'}")


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
    return [
        Ruled(f"{name} {names[folders[text]]}" if folders.get(text) in names else name, rule)
        for text, name, rule in parsed
    ]


def _check(rules: Sequence[Ruled], batch_rows: int, timed_problems: int) -> None:
    for one in rules:
        if one.name == PLAIN or (one.name == LOSSLESS and one.rule is not None):
            raise ValueError(
                f"a rule is named {one.name!r}, which is the name of a row that is not lossy; give another NAME=RULE"
            )
    labels = [one.label for one in rules]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"rule {label!r} is there twice; name the rules apart with NAME=RULE")
    for name, value in (("batch_rows", batch_rows), ("timed_problems", timed_problems)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")


def _questions(file: Path, samples: Sequence[Sample], judged: Checker) -> dict[str, Mapping[str, Any]]:
    """The whole row of each problem by its id, once no answer can fail to be judged by it: better told now than when all is decoded."""
    found: dict[str, Mapping[str, Any]] = {}
    for line, row in read_jsonl(file, []):  # `read_samples` tells of those left out
        try:
            name = row_id(row, f"line-{line}")
        except UnusableRow:
            continue
        if name in found:
            raise ValueError(
                f"{file}:{line}: id is {name!r}; another problem has it already; give each an id of its own"
            )
        found[name] = row
    for sample in samples if judged.probed else ():
        try:
            judged.check(found[sample.id], "")
        except ValueError as error:
            raise ValueError(f"{file}: problem {sample.id}: {error}") from error
    return found


def _drafter(folder: Path, target: Target, tokenizer: str, trust_remote_code: bool) -> Drafter:
    drafter = load_drafter(folder, str(target.dtype).removeprefix("torch."), trust_remote_code)
    drafter.attach(target.ends)
    drafter.check_tokenizer(tokenizer)
    nn.Module.to(drafter, target.device)
    return drafter


def _write(out: Path, rows: Sequence[RuleRow], made_by: dict[str, Any], target: str, drafter: str) -> None:
    provenance.write(out, made_by)
    facts = {key: made_by[key] for key in ("command", "machine", "versions")}
    report = facts | {"target": target, "drafter": drafter, "rows": [row.to_json() for row in rows]}
    atomic_write(out / "report.png", draw_trade(rows))
    atomic_write(out / "report.md", to_markdown(facts, target, drafter, rows))
    atomic_write(out / "report.json", json.dumps(report, indent=1, allow_nan=False) + "\n")

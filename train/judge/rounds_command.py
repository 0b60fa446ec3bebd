"""`draftsmith judge rounds`: a judge learns from what it lets stand, round by round.

Owns the options, the files of a round, and where a stopped command continues. Does not know how a round is decoded or trained.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from draftsmith.arguments import FLAT
from draftsmith.data.cache.extract import extract
from draftsmith.data.chat_template import chat_of
from draftsmith.data.prompts import ALL_PROMPTS, PROMPT_FILE, PromptSelection
from draftsmith.decode.model_settings import for_target
from draftsmith.decode.sampling import DrawOptions, settings_of
from draftsmith.decode.verify.lossy_rules import JudgeRule
from draftsmith.files import atomic_write, exclusive, sha256_file
from draftsmith.label.answer_rows import read_answers, write_answers
from draftsmith.label.checkers.checkers import Checker, load_checker
from draftsmith.label.commands.checked_answers import LicensedPrompt
from draftsmith.label.commands.generate_command import licensed_questions
from draftsmith.label.commands.rows_command import rows as label_rows
from draftsmith.models.files.checkpoint_files import WEIGHTS
from draftsmith.models.files.fingerprint import tokenizer_fingerprint
from draftsmith.models.judge import load_judge
from draftsmith.models.target.options import DEFAULTS, TargetOptions
from draftsmith.models.target.prompt_template import OWN_TEMPLATE, TemplateChoice
from draftsmith.models.tree.shapes import parse_shape
from draftsmith.ownership import check_unclaimed
from draftsmith.provenance import differences, training
from draftsmith.train.judge.data import JudgeDataModule
from draftsmith.train.judge.module import JudgeModule
from draftsmith.train.judge.rounds import (
    Decoder,
    RoundFigures,
    Served,
    checked,
    figures,
    keep,
    rounds_table,
    train,
    write_table,
)

ANSWERS, TO_LABEL, COUNTS, ROWS, SETTINGS = (
    "answers.jsonl",
    "to-label.jsonl",
    "decoded.json",
    "rows.jsonl",
    "settings.json",
)
LONG_ANSWERS = DrawOptions(max_new_tokens=256)
_KEPT = (
    *("l2", "class_weight", "iterations", "history", "tolerance"),
    *("max_wrong", "threshold_over", "hold_upper", "num_replicates", "ends_dtype"),
)
"""Settings of a judge's training that its rounds keep, beside the feature."""


@dataclass(frozen=True, kw_only=True)
class RoundOptions:
    """How many rounds, and of how many questions.

    Args:
        rounds: How often the judge decodes, is checked and trained.
        questions: Questions of each round; each round takes others.
        batch_rows: Problems answered at the same time.

    Raises:
        ValueError: one of them is below 1.
    """

    rounds: int = 2
    questions: int = 200
    batch_rows: int = 32

    def __post_init__(self) -> None:
        for name in ("rounds", "questions", "batch_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


TWO_ROUNDS = RoundOptions()


def judge_rounds(
    target: str,
    judge: Path,
    rows: list[Path],
    cache: list[Path],
    drafters: list[str],
    prompts: Path,
    out: Path,
    checker: str | None = None,
    shapes: tuple[str, ...] = ("1x16",),
    licence: str | None = None,
    course: Annotated[RoundOptions, FLAT] = TWO_ROUNDS,
    draw: Annotated[DrawOptions, FLAT] = LONG_ANSWERS,
    selection: Annotated[PromptSelection, FLAT] = ALL_PROMPTS,
    where: Annotated[TargetOptions, FLAT] = DEFAULTS,
    rendering: Annotated[TemplateChoice, FLAT] = OWN_TEMPLATE,
) -> None:
    """Decode training questions with a judge, let a checker label what stood, and train the judge again, round by round.

    A judge that learns from one drafter's errors lets those of another stand. Give all drafters that it is to serve. Every round
    trains with the settings that the judge's folder records, and keeps its gate. To resume a stopped
    command, start it again. Writes OUT/round-1, OUT/round-2, ... with a judge in each, and a table: rounds.md and rounds.json.

    Args:
        target: Directory or hub id of the target, or embedded:target.
        judge: Folder of the judge that the first round decodes with.
        rows: Files of labelled rows that it was trained on; every round learns from these, too.
        cache: Folders of their states.
        drafters: Folders of trained drafters, or draft LMs, that the judge is to serve.
        prompts: Problems of the training split, with their reference answers.
        out: Folder of the rounds.
        checker: What labels the answers, as in `draftsmith label generate`. Without one, people do: the command writes to-label.jsonl and
            stops. Put their labels beside it as answers.jsonl, and start it again.
        shapes: How much each drafter drafts: one shape for all, or one for each.
        licence: Licence of the problems, where their rows do not name one.
        course: How many rounds; see `RoundOptions`.
        draw: Length, seed and temperature of the answers; see `DrawOptions`.
        selection: Which problems; see `PromptSelection`.
        where: Where the target runs; see `TargetOptions`.
        rendering: The chat template; see `TemplateChoice`.

    Raises:
        ValueError: settings that do not work together, too few problems, or a folder of a command with other settings.
    """
    check_unclaimed(out)
    served = served_drafters(drafters, shapes)
    checking = None if checker is None else load_checker(checker)
    where = where.resolved(target)
    questions = _parts(licensed_questions(prompts, selection, licence, checking), course)
    settings = {"target": target, "judge": str(judge), "checker": checker, "questions": course.questions} | asdict(draw)
    settings |= {"drafters": [asdict(each) for each in served], **_files(judge, rows, prompts)}
    recipe = recipe_of(judge)
    for remark in recipe.remarks:
        print(remark, file=sys.stderr)
    run = _Rounds(target, rows, cache, served, out, checking, draw, course, where, rendering, recipe)
    with exclusive(out / SETTINGS):
        _check_settings(out / SETTINGS, settings)
        run.all(judge, questions)


def _files(judge: Path, rows: Sequence[Path], prompts: Path) -> dict[str, Any]:
    """The fingerprints of what the rounds read."""
    problems = prompts / PROMPT_FILE if prompts.is_dir() else prompts
    weights = sha256_file(judge / WEIGHTS)
    return {"rows": [sha256_file(file) for file in rows], "prompts": sha256_file(problems), "weights": weights}


def served_drafters(drafters: Sequence[str], shapes: Sequence[str]) -> list[Served]:
    """Each drafter with its shape.

    Args:
        drafters: by name.
        shapes: one for all, or one for each.

    Raises:
        ValueError: another number of shapes, none of either, or a shape that is none.
    """
    if not drafters or len(shapes) not in (1, len(drafters)):
        raise ValueError(
            f"{len(drafters)} drafters and {len(shapes)} shapes are named; name at least one drafter, and one shape for all or one for each"
        )
    for shape in shapes:
        parse_shape(shape)
    every = list(shapes) * len(drafters) if len(shapes) == 1 else list(shapes)
    return [Served(name, shape) for name, shape in zip(drafters, every, strict=True)]


def _parts(questions: Sequence[LicensedPrompt], course: RoundOptions) -> list[Sequence[LicensedPrompt]]:
    needed = course.rounds * course.questions
    if len(questions) < needed:
        raise ValueError(
            f"{len(questions)} problems are too few for {course.rounds} rounds of {course.questions}; give {needed}, or lower --questions"
        )
    return [questions[start : start + course.questions] for start in range(0, needed, course.questions)]


def _check_settings(file: Path, settings: dict[str, Any]) -> None:
    """Writes the settings, or compares them with those of the command that is resumed."""
    if not file.is_file():
        atomic_write(file, json.dumps(settings, indent=1) + "\n")
        return
    changed = differences(json.loads(file.read_text(encoding="utf-8")), settings)
    if changed:
        raise ValueError(
            f"{file.parent} holds rounds with other settings: {'; '.join(changed)}; give the same, or another --out"
        )


@dataclass(frozen=True)
class Recipe:
    """How a judge was trained: the judges of all rounds are trained in the same way.

    Attributes:
        module: settings of `JudgeModule`.
        data: settings of `JudgeDataModule`.
        remarks: what a user should know of settings that rounds cannot keep.
    """

    module: dict[str, Any]
    data: dict[str, Any]
    remarks: tuple[str, ...] = ()


def recipe_of(judge: Path) -> Recipe:
    """The settings of a judge's training, from the record in its folder.

    Args:
        judge: its folder.

    Raises:
        ValueError: rounds cannot train such a judge: it reads the draft model's states, or it learnt from mined labels alone.
    """
    head, record = load_judge(judge), training(judge).get("config", {})
    JudgeRule(head)
    data = dict(record.get("data", {}))
    most, remarks = data.pop("max_questions", None), []
    if "mined" in head.config.labels.get("how", {}) and not data.get("join_kinds"):
        unknown = "" if "data" in record else f" ({judge} does not record whether it was: train it again for that)"
        raise ValueError(
            f"{judge} learnt from mined labels, and rounds add labels of a checker or of people; wrong means two things there: start from "
            f"a judge that was trained with join_kinds: true{unknown}, or without mined labels"
        )
    if most is not None:
        remarks.append(
            f"{judge} was trained on at most {most} questions of its rows; rounds learn from all rows that you give; leave rows out for "
            "fewer"
        )
    if not record:
        remarks.append(
            f"{judge} does not record how it was trained; rounds train with the settings of configs/judge.yaml"
        )
    elif "data" not in record:
        remarks.append(
            f"an older draftsmith trained {judge}: its held-out share, seed and join_kinds are not recorded; rounds train with those of "
            "configs/judge.yaml"
        )
    module = {name: record[name] for name in _KEPT if name in record} | {"feature": head.config.feature}
    if record:
        # Older records have no such setting, for the threshold was always over all tokens.
        module.setdefault("threshold_over", "all")
    return Recipe(module, data, tuple(remarks))


@dataclass(frozen=True)
class _Rounds:
    """What all rounds share; see `judge_rounds`."""

    target: str
    rows: Sequence[Path]
    cache: Sequence[Path]
    served: Sequence[Served]
    out: Path
    checker: Checker | None
    draw: DrawOptions
    course: RoundOptions
    where: TargetOptions
    rendering: TemplateChoice
    recipe: Recipe

    def all(self, judge: Path, questions: Sequence[Sequence[LicensedPrompt]]) -> None:
        """Every round with its questions, as far as there are labels."""
        table: list[RoundFigures] = []
        for number, part in enumerate(questions, start=1):
            row = self.once(number, judge, part)
            if row is None:
                return
            table.append(row)
            write_table(self.out, table)
            judge = self.out / f"round-{number}" / "judge"
        print(f"{rounds_table(table)}\njudge: {judge}")

    def once(self, number: int, judge: Path, questions: Sequence[LicensedPrompt]) -> RoundFigures | None:
        """One round, from where it was stopped; None where people have to label first."""
        folder = self.out / f"round-{number}"
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / ANSWERS).is_file():
            if not (folder / TO_LABEL).is_file():
                self._decode(folder, judge, questions, number)
            if not (folder / ANSWERS).is_file():
                print(
                    f"label {folder / TO_LABEL} (draftsmith label import and serve), export the labels to {folder / ANSWERS}, and start "
                    "the command again"
                )
                return None
        if not (folder / ROWS).is_file():
            # One class alone is fine here: the rows are learnt from together with the first ones.
            label_rows(
                self.target,
                folder / ROWS,
                answers=folder / ANSWERS,
                one_class=True,
                where=self.where,
                rendering=self.rendering,
            )
        extract(
            self.target,
            folder / ROWS,
            folder / "cache",
            target_dtype=self.where.dtype,
            where=self.where,
            rendering=self.rendering,
        )
        if not (folder / "judge").is_dir():
            self._train(folder, judge, number)
        counts = json.loads((folder / COUNTS).read_text(encoding="utf-8"))
        return figures(number, folder, list(read_answers(folder / ANSWERS)), counts, self.checker is not None)

    def _decode(self, folder: Path, judge: Path, questions: Sequence[LicensedPrompt], number: int) -> None:
        tokenizer = self.where.tokenizer(self.target)
        model = self.where.load_to_decode(self.target)
        rendering, where = self.rendering, self.where
        head = load_judge(judge)
        head.check_tokenizer(tokenizer_fingerprint(tokenizer))
        chat = chat_of(
            self.target, tokenizer, rendering.template, where.revision, where.trust_remote_code, rendering.options
        )
        settings = for_target(settings_of(self.draw, eos_token_ids=model.eos_token_ids), model)
        decoder = Decoder(model, tokenizer, chat, settings, self.course.batch_rows)
        drafters = [(each, decoder.drafter(each.name, where.trust_remote_code)) for each in self.served]
        decoded = decoder.decode(head, drafters, questions, number)
        atomic_write(folder / COUNTS, decoded.counts() + "\n")
        if self.checker is None:
            write_answers(folder / TO_LABEL, decoded.answers)
        else:
            write_answers(folder / ANSWERS, checked(decoded, self.checker))

    def _train(self, folder: Path, judge: Path, number: int) -> None:
        rounds = [self.out / f"round-{each}" for each in range(1, number + 1)]
        data = JudgeDataModule(
            [*self.cache, *(each / "cache" for each in rounds)],
            [*self.rows, *(each / ROWS for each in rounds)],
            **self.recipe.data,
        )
        where = self.where
        module = JudgeModule(
            self.target,
            **self.recipe.module,
            revision=where.revision,
            adapter=where.adapter,
            trust_remote_code=where.trust_remote_code,
        )
        train(module, data, folder / "train")
        keep(folder / "train", self.served, folder / "judge", load_judge(judge))

"""`draftsmith judge tune`: a judge's threshold and gate, chosen by the answers that they give.

Owns the order of the work, its files, and what is written into the tuned judge. Does not know how a setting is tried.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from transformers import PreTrainedTokenizerBase

from draftsmith import provenance
from draftsmith.arguments import FLAT
from draftsmith.data.prompts import ALL_PROMPTS, PromptSelection
from draftsmith.decode.sampling import DrawOptions
from draftsmith.evaluate.lossy.contest import Contest, prepare
from draftsmith.evaluate.lossy.kept_answers import HEAD, KeptAnswers, kept_answers
from draftsmith.evaluate.lossy.lossy import IsRight
from draftsmith.evaluate.lossy.lossy_command import LONG_ANSWERS
from draftsmith.evaluate.lossy.paired import problems_needed
from draftsmith.evaluate.lossy.sweep import Sweep
from draftsmith.evaluate.lossy.trial import Trial, best_trial, settings_of_sweep, why_none
from draftsmith.evaluate.lossy.tuning_report import sweep_table, to_markdown
from draftsmith.evaluate.resume import WORK_FILE
from draftsmith.files import atomic_directory, exclusive, sha256_file
from draftsmith.label.checkers.checkers import final_number, load_checker
from draftsmith.models.drafters.drafter_folder import drafter_fingerprint, drafter_folder
from draftsmith.models.files.checkpoint_files import WEIGHTS
from draftsmith.models.judge import NO_GATE, Judge, load_judge
from draftsmith.models.target.options import DEFAULTS, TargetOptions
from draftsmith.models.target.prompt_template import OWN_TEMPLATE, TemplateChoice
from draftsmith.models.tree.shapes import parse_shape, shape_text
from draftsmith.ownership import check_begun, check_replaceable

GateName = Literal["none", "line", "reply"]
STAGE = "draftsmith judge tune"


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """Which settings are tried, and what they may lose.

    Args:
        thresholds: Thresholds of the judge, each from 0 to 1.
        gates: none judges each token alone; line keeps a drafted line whole or leaves it; reply does so with the rest of the reply.
        veto: Try each gate also with a veto: the target's own tokens must pass the judge, too.
        most_lost: Points of right answers that a setting may lose, with 95 % confidence.
        looks: A setting stops that surely loses more, gains nothing, or gains less than another that holds; so many times the answers
            are looked at.
        batch_rows: Problems answered together.
        timed_problems: Problems answered once more, one at a time, by the best setting of each shape: the fastest is kept.

    Raises:
        ValueError: a setting is out of range, or is there twice.
    """

    thresholds: tuple[float, ...] = (0.3, 0.5, 0.7, 0.9, 0.97, 0.99)
    gates: tuple[GateName, ...] = ("none",)
    veto: bool = False
    most_lost: float = 1.0
    looks: int = 5
    batch_rows: int = 32
    timed_problems: int = 20

    def __post_init__(self) -> None:
        for threshold in self.thresholds:
            if not 0.0 <= threshold < 1.0:
                raise ValueError(
                    f"a threshold is {threshold}; give numbers from 0 on and below 1, which accepts nothing"
                )
        if not 0.0 < self.most_lost < 100.0:
            raise ValueError(f"most_lost is {self.most_lost}; give points above 0 and below 100")
        for name in ("looks", "batch_rows", "timed_problems"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("thresholds", "gates"):
            values = list(getattr(self, name))
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} are {values}; give at least one, and each once")
        if self.veto and list(self.gates) == [NO_GATE]:
            raise ValueError(f"veto is true and gates are {list(self.gates)}; a veto needs a gate: add line or reply")

    @property
    def vetoes(self) -> dict[str, list[bool]]:
        """Gates, each with the values of the veto to try."""
        return {gate: [False, True] if self.veto and gate != NO_GATE else [False] for gate in self.gates}


SWEEP = SweepOptions()


def tune_judge(
    target: str,
    drafter: str,
    judge: Path,
    prompts: Path,
    out: Path,
    checker: str | None = None,
    shapes: tuple[str, ...] = ("1x16",),
    sweep: Annotated[SweepOptions, FLAT] = SWEEP,
    draw: Annotated[DrawOptions, FLAT] = LONG_ANSWERS,
    selection: Annotated[PromptSelection, FLAT] = ALL_PROMPTS,
    where: Annotated[TargetOptions, FLAT] = DEFAULTS,
    rendering: Annotated[TemplateChoice, FLAT] = OWN_TEMPLATE,
) -> None:
    """Choose a judge's threshold, gate and shape by answers: the fastest of the settings that surely lose less than one point.

    Every setting answers the problems with the judge, and the answers are compared with lossless decoding's. Writes the tuned judge into
    `judge`, beside tuning.md and tuning.json. Where no setting keeps the answers, the judge gets threshold 1 and accepts nothing. To
    resume a killed run, repeat the command: what was answered is neither decoded nor checked again.

    Args:
        target: Directory or hub id of the target, or embedded:target.
        drafter: Folder of a trained drafter, or a draft LM, that the judge is to serve.
        judge: Folder of a trained judge.
        prompts: JSONL file of training problems that the judge was not trained on, with their reference answers.
        out: Folder for the tuned judge and the report; an earlier one is replaced as a whole. OUT.unfinished.jsonl beside it keeps the
            answers until then.
        checker: What judges whether an answer is right, as in `draftsmith label generate`. Without one quality stays unmeasured, and
            answers count that agree with the target's own.
        shapes: How much to draft: each shape is tried. Gates need chains such as 1x64.
        sweep: Which settings; see `SweepOptions`.
        draw: Length, seed and temperature of the answers; see `DrawOptions`.
        selection: Which problems; see `PromptSelection`.
        where: Where the target runs; see `TargetOptions`.
        rendering: The chat template; see `TemplateChoice`.
    """
    check_replaceable(out, STAGE, [judge])
    check_begun(work := work_file(out), HEAD)
    for shape in shapes:
        parse_shape(shape)
    head, judged_by = load_judge(judge), None if checker is None else load_checker(checker)
    where = where.resolved(target)
    contest = prepare(target, drafter, prompts, judged_by, draw, selection, where, rendering)
    settings = settings_of_sweep(shapes, [float(value) for value in sweep.thresholds], sweep.vetoes)
    _say_if_too_few(len(contest.samples), sweep.most_lost)
    with exclusive(out), kept_answers(work, contest.facts, judged_by is not None) as kept:
        trials = (trials_of := _sweep(contest, head, sweep, kept)).run(settings)
        tuned, facts = _tuned(trials_of, trials, checker, sweep.most_lost / 100)
        folder = drafter_folder(drafter)
        tuned.config.drafters = [
            {"name": drafter, "fingerprint": drafter_fingerprint(folder), "shapes": _kept_shapes(facts, shapes)}
        ]
        config = (
            asdict(sweep) | asdict(contest.settings) | {"shapes": list(shapes), "checker": checker, "drafter": drafter}
        )
        inputs = dict(contest.inputs) | {str(judge / WEIGHTS): sha256_file(judge / WEIGHTS)}
        record = provenance.record(provenance.command_line(), config, inputs) | {"training": provenance.training(judge)}
        _write(out, tuned, trials, facts, record)
    print(f"{sweep_table(trials, sweep.most_lost / 100)}\n{facts['said']}\ntuned judge: {out / 'judge'}")


def work_file(out: Path) -> Path:
    """Where the answers lie until `out` is written: beside it, because it is replaced as a whole.

    Args:
        out: folder of the tuned judge.
    """
    place = out.resolve()
    return place.with_name(f"{place.name}.{WORK_FILE}")


def _sweep(contest: Contest, judge: Judge, options: SweepOptions, kept: KeptAnswers) -> Sweep:
    ends = line_end_ids(contest.tokenizer) if "line" in options.gates else []
    most_lost, timed = options.most_lost / 100, options.timed_problems
    return Sweep(contest, judge, ends, most_lost, options.looks, options.batch_rows, agreement, timed, kept)


def line_end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens with a line feed in their text.

    Args:
        tokenizer: of the target.

    Raises:
        ValueError: no token has one.
    """
    ids = [token for token in range(len(tokenizer)) if "\n" in str(tokenizer.decode([token]))]
    if not ids:
        raise ValueError("no token of this tokenizer holds a line feed, so no line ends; leave the gate of lines out")
    return ids


def agreement(texts: Sequence[str]) -> IsRight:
    """What judges answers where no checker does: whether they end in the same number as the target's own, or else have the same text.

    Args:
        texts: the target's own answers.
    """
    numbers = [final_number(text) for text in texts]

    def agrees(number: int, text: str) -> bool:
        own = numbers[number]
        return text == texts[number] if own is None else final_number(text) == own

    return agrees


def _say_if_too_few(problems: int, most_lost: float) -> None:
    needed = problems_needed(most_lost / 100)
    if problems < needed:
        print(
            f"{problems} problems are too few: even if no answer changes, it takes {needed} to show that less than {most_lost:g} points "
            "are lost"
        )


def _tuned(
    sweep: Sweep, trials: Sequence[Trial], checker: str | None, most_lost: float
) -> tuple[Judge, dict[str, Any]]:
    """The judge with the chosen setting, or shut; and what is known of it, which its config keeps."""
    best = best_trial(trials, most_lost)
    facts: dict[str, Any] = {
        "checker": checker,
        "problems": len(sweep.contest.samples),
        "most_lost": most_lost,
        "settings": len(trials),
        "lossless_right": sweep.lossless_right,
        "holds": best is not None,
    }
    if best is None:
        judge = sweep.judge.with_threshold(1.0).with_gate(NO_GATE)
        facts["why"] = why_none(trials, most_lost, problems_needed(most_lost))
        said = f"no setting is kept: {facts['why']}. The judge gets threshold 1 and accepts nothing"
    else:
        judge, low = sweep.judge_with(best.setting), best.bounds[0]
        facts |= asdict(best.setting) | {"right": best.right / best.problems, "change": best.change, "change_low": low}
        facts |= {"accepted_per_cycle": best.accepted_per_cycle, "lossless_per_cycle": best.lossless_per_cycle}
        facts |= {"seconds_per_token": best.seconds_per_token, "times_plain": best.times_plain}
        said = f"kept: {best.setting}, {best.accepted_per_cycle:.2f} tokens a cycle"
        if best.times_plain is not None:
            said += f", {best.times_plain:.2f} times as fast as plain decoding"
    facts["threshold"] = judge.config.threshold
    if checker is None:
        said += ". Quality is unmeasured: no checker judged the answers, they were compared with the target's own"
    judge.config.labels = {**judge.config.labels, "tuned": dict(facts)}
    return judge, facts | {"said": said}


def _kept_shapes(facts: dict[str, Any], shapes: Sequence[str]) -> list[str]:
    """As `decode` writes them: a static tree by its paths, whatever it was called."""
    kept = [facts["shape"]] if facts["holds"] else shapes
    return [shape_text(parse_shape(shape)) for shape in kept]


def _write(out: Path, judge: Judge, trials: Sequence[Trial], facts: dict[str, Any], record: dict[str, Any]) -> None:
    rows = [
        asdict(trial) | {"change": trial.change, "change_bounds": trial.bounds, "per_cycle": trial.accepted_per_cycle}
        for trial in trials
    ]
    with atomic_directory(out, STAGE) as folder:
        judge.save_pretrained(folder / "judge")
        provenance.write(folder / "judge", record)
        load_judge(folder / "judge")  # what is kept can be used
        (folder / "tuning.json").write_text(
            json.dumps({"kept": facts, "trials": rows}, indent=1) + "\n", encoding="utf-8"
        )
        (folder / "tuning.md").write_text(to_markdown(trials, facts, record), encoding="utf-8")
        provenance.write(folder, record)

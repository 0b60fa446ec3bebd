"""On-policy rounds of a judge: what it lets stand is checked, and it learns from that.

Owns one round: decoding with the judge, labels of what stood, the training on all rows so far, and the figures of a round. Knows no
command line, and not how a judge is fitted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytorch_lightning as pl
from transformers import PreTrainedTokenizerBase

from draftsmith import provenance
from draftsmith.data.chat_template import ChatTemplate
from draftsmith.decode.batch import Generation
from draftsmith.decode.engine import Engine
from draftsmith.decode.sampling import GenerationSettings
from draftsmith.decode.verify.lossy_rules import JudgeRule
from draftsmith.files import atomic_directory, atomic_write
from draftsmith.label.checkers.checkers import Checker
from draftsmith.label.commands.checked_answers import LicensedPrompt
from draftsmith.label.schema import Answer, Label, answer_id
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.drafter_folder import drafter_fingerprint, drafter_folder, load_drafter
from draftsmith.models.drafters.other_layouts import TargetBond
from draftsmith.models.files.fingerprint import tokenizer_fingerprint
from draftsmith.models.judge import Judge, JudgedDrafter, load_judge
from draftsmith.models.target.target import Target
from draftsmith.models.tree.shapes import parse_shape, shape_text
from draftsmith.train.judge.callbacks import KeepJudge
from draftsmith.train.judge.data import JudgeDataModule
from draftsmith.train.judge.module import AUC, JudgeModule

STAGE = "draftsmith judge rounds"
_EPOCHS, _PATIENCE = 50, 5


@dataclass(frozen=True)
class Served:
    """A drafter that the judge is to serve.

    Attributes:
        name: its folder, or a draft LM.
        shape: of its drafts.
    """

    name: str
    shape: str


@dataclass(frozen=True)
class RoundFigures:
    """One row of the table: what the judge of the round before let stand.

    Attributes:
        number: of the round, from 1.
        answers: how many were decoded, those that were cut off included.
        right: how many the checker found right; None where people labelled.
        accepted_per_cycle: draft tokens that stood.
        by_rule: tokens that stood by the judge alone.
        tokens: all tokens of the answers.
        auc: area under the ROC curve of the judge that this round trained, over held-out questions.
        auc_differing: the same over the tokens that the target would not have chosen; None where they are of one class.
        threshold: of the judge that this round trained.
    """

    number: int
    answers: int
    right: int | None
    accepted_per_cycle: float
    by_rule: int
    tokens: int
    auc: float
    auc_differing: float | None
    threshold: float


@dataclass(frozen=True)
class Decoded:
    """The answers of a round.

    Attributes:
        answers: unlabelled, one for each question and drafter.
        rows: the problem's whole row for each answer.
        accepted_per_cycle: see `RoundFigures`, as the next two.
        by_rule: see there.
        tokens: see there.
        replies: how many were decoded.
    """

    answers: list[Answer]
    rows: list[LicensedPrompt]
    accepted_per_cycle: float
    by_rule: int
    tokens: int
    replies: int

    def counts(self) -> str:
        """The figures as JSON."""
        return json.dumps(
            {
                "accepted_per_cycle": self.accepted_per_cycle,
                "by_rule": self.by_rule,
                "tokens": self.tokens,
                "replies": self.replies,
            }
        )


@dataclass(frozen=True)
class Decoder:
    """What every round decodes with.

    Attributes:
        target: the frozen model.
        tokenizer: its.
        chat: its chat template.
        settings: of the answers.
        batch_rows: answers in flight.
    """

    target: Target
    tokenizer: PreTrainedTokenizerBase
    chat: ChatTemplate
    settings: GenerationSettings
    batch_rows: int

    def drafter(self, name: str, trust_remote_code: bool) -> Drafter:
        """A drafter, attached to the target.

        Args:
            name: its folder, or a draft LM.
            trust_remote_code: whether its Python files may run.

        Raises:
            ValueError: it belongs to another target or tokenizer.
        """
        own = tokenizer_fingerprint(self.tokenizer)
        dtype, bond = str(self.target.dtype).removeprefix("torch."), TargetBond(self.target.ends, own)
        drafter = load_drafter(drafter_folder(name), dtype, trust_remote_code, target=bond)
        drafter.attach(self.target.ends)
        drafter.check_tokenizer(own)
        return drafter.to_decode(self.target.device)

    def decode(
        self, judge: Judge, drafters: Sequence[tuple[Served, Drafter]], questions: Sequence[LicensedPrompt], number: int
    ) -> Decoded:
        """Let every drafter's drafts pass the judge.

        Args:
            judge: of the round before.
            drafters: that it serves.
            questions: of this round.
            number: of the round, for the names of the answers' models.

        Raises:
            ValueError: every reply was cut off or is empty.
        """
        answers: list[Answer] = []
        rows: list[LicensedPrompt] = []
        replies: list[Generation] = []
        prompts = [self.chat.first_prompt_ids(question.prompt.messages) for question in questions]
        room = max(map(len, prompts)) + self.settings.max_new_tokens
        for served, drafter in drafters:
            engine = Engine(self.target, drafter, parse_shape(served.shape), rule=JudgeRule(judge))
            own: dict[int, Generation] = dict(
                engine.stream(list(enumerate(prompts)), self.settings, self.batch_rows, room)
            )
            for place, question in enumerate(questions):
                answer = self._answer(question, own[place], f"{served.name} at {served.shape}, round {number}")
                if answer is not None:
                    answers.append(answer)
                    rows.append(question)
                replies.append(own[place])
        accepted = [count for reply in replies for count in reply.accepted]
        by_rule = sum(len(reply.by_rule) for reply in replies)
        tokens = sum(len(reply.token_ids) for reply in replies)
        _say_cut_off(len(replies) - len(answers), len(replies), self.settings.max_new_tokens)
        return Decoded(answers, rows, sum(accepted) / max(1, len(accepted)), by_rule, tokens, len(replies))

    def _answer(self, question: LicensedPrompt, reply: Generation, model: str) -> Answer | None:
        """The reply as an answer without a label; None for one that was cut off or is empty."""
        text = str(self.tokenizer.decode(reply.token_ids, skip_special_tokens=True))
        if not text.strip() or reply.finish not in ("eos", "stop"):
            return None
        messages, source = question.prompt.messages, question.prompt.source
        name = answer_id(source, messages, text, model)
        return Answer(name, messages, text, model, question.licence, source)


def _say_cut_off(cut: int, replies: int, most: int) -> None:
    """Tells of replies that nobody labels, on standard error.

    Raises:
        ValueError: none is left.
    """
    said = f"{cut} of {replies} replies are empty or longer than max_new_tokens, {most}; raise --max_new_tokens"
    if cut == replies:
        raise ValueError(said)
    if cut:
        print(f"{said}: nobody labels them, and none of them counts as right", file=sys.stderr)


def checked(decoded: Decoded, checker: Checker) -> list[Answer]:
    """The answers with a checker's labels.

    Args:
        decoded: what stood.
        checker: labels it.

    Raises:
        ValueError: the checker cannot judge a row.
    """
    labelled = []
    for answer, question in zip(decoded.answers, decoded.rows, strict=True):
        verdict = checker.check(question.row, answer.response)
        label = Label(verdict.verdict, checker.name, "rule", verdict.error, None, verdict.note)
        labelled.append(replace(answer, label=label))
    return labelled


def seen(drafters: Sequence[Served]) -> list[JudgedDrafter]:
    """The drafters as a judge records them: each once, with all its shapes.

    Args:
        drafters: that the rounds decoded with.
    """
    records: dict[str, JudgedDrafter] = {}
    for served in drafters:
        record = records.setdefault(
            served.name,
            JudgedDrafter(name=served.name, fingerprint=drafter_fingerprint(drafter_folder(served.name)), shapes=[]),
        )
        # As `decode` writes it: a static tree by its paths, whatever it was called.
        record["shapes"].append(shape_text(parse_shape(served.shape)))
    return list(records.values())


def train(module: JudgeModule, data: JudgeDataModule, root: Path) -> None:
    """Fit a judge; the best one is kept in `root/judge`.

    Args:
        module: a new one.
        data: of all rows.
        root: of the run.
    """
    stop = pl.callbacks.EarlyStopping(AUC, mode="max", patience=_PATIENCE, min_delta=1e-4)
    trainer = pl.Trainer(
        default_root_dir=root,
        accelerator="cpu",
        devices=1,
        max_epochs=_EPOCHS,
        callbacks=[KeepJudge(replace=True), stop],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
    )
    trainer.fit(module, data)


def keep(trained: Path, drafters: Sequence[Served], folder: Path, before: Judge) -> None:
    """Write the trained judge with the drafters that it has seen, and with the gate of the judge before.

    Args:
        trained: folder of the run.
        drafters: that it has seen.
        folder: where to.
        before: the judge that the round decoded with.
    """
    gate = before.config
    judge = load_judge(trained / "judge").with_gate(gate.gate, gate.veto, gate.line_end_ids)
    judge.config.drafters = seen(drafters)
    record = provenance.read(trained / "judge")
    with atomic_directory(folder, STAGE) as partial:
        judge.save_pretrained(partial)
        load_judge(partial)  # what is kept can be used
        provenance.write(partial, record)


def figures(
    number: int, folder: Path, answers: Sequence[Answer], counts: dict[str, float], by_checker: bool
) -> RoundFigures:
    """The row of a finished round.

    Args:
        number: of the round.
        folder: of the round.
        answers: with labels.
        counts: see `Decoded.counts`.
        by_checker: whether a checker labelled.
    """
    metrics = provenance.read(folder / "judge")["config"]["metrics"]
    right = [answer.label is not None and answer.label.verdict == "correct" for answer in answers]
    return RoundFigures(
        number,
        int(counts["replies"]),
        sum(right) if by_checker else None,
        float(counts["accepted_per_cycle"]),
        int(counts["by_rule"]),
        int(counts["tokens"]),
        float(metrics[AUC]),
        metrics.get(f"{AUC}_differing"),
        load_judge(folder / "judge").config.threshold,
    )


def rounds_table(rows: Sequence[RoundFigures]) -> str:
    """All rounds, in Markdown.

    Args:
        rows: in order.
    """
    lines = [
        "| round | answers | right | accepted a cycle | by the judge alone | AUC after it | AUC where the target differs | threshold |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        right = "labelled by people" if row.right is None else f"{100 * row.right / max(1, row.answers):.1f} %"
        differing = "-" if row.auc_differing is None else f"{row.auc_differing:.4f}"
        share = 100 * row.by_rule / max(1, row.tokens)
        lines.append(
            f"| {row.number} | {row.answers} | {right} | {row.accepted_per_cycle:.2f} | {share:.1f} % | {row.auc:.4f} | {differing} "
            f"| {row.threshold:.4g} |"
        )
    return "\n".join(lines)


def write_table(out: Path, rows: Sequence[RoundFigures]) -> None:
    """rounds.md and rounds.json.

    Args:
        out: the folder of all rounds.
        rows: in order.
    """
    atomic_write(out / "rounds.json", json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    meaning = (
        "*Right*, *accepted* and *by the judge alone* are of the judge before the round, over the questions of the round. *AUC* and "
        "*threshold* are of the judge after it, over held-out questions."
    )
    atomic_write(out / "rounds.md", f"# On-policy rounds\n\n{rounds_table(rows)}\n\n{meaning}\n")

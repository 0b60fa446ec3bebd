"""The command `draftsmith label mine`: which of the draft's tokens leave the target's answer as it is.

Owns its options, the log from which a killed run resumes, and the files that it writes. How a question is mined is the business of
:mod:`draftsmith.label.mine.question_mining`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from transformers import PreTrainedTokenizerBase

from draftsmith import provenance
from draftsmith.arguments import FLAT
from draftsmith.data.chat_template import ChatTemplate
from draftsmith.data.progress import progress
from draftsmith.data.replies.reply_settings import reply_settings
from draftsmith.decode.sampling import GenerationSettings, ReplyOptions
from draftsmith.escapes import visible
from draftsmith.files import JsonlAppender, atomic_write, exclusive
from draftsmith.json_text import json_text, parse_json_object
from draftsmith.label.answer_rows import write_answers
from draftsmith.label.checkers.checkers import Checker, load_checker
from draftsmith.label.mine.answers import Parse, ParserName, answer_parser
from draftsmith.label.mine.many_questions import ForwardCounts, Miner, check_questions
from draftsmith.label.mine.outputs import counts, from_log, labelled_answers, to_log, token_rows
from draftsmith.label.mine.question_mining import MiningResult, Rules
from draftsmith.label.mine.questions import QuestionRow, judged_by, read_questions
from draftsmith.label.token_rows import write_rows
from draftsmith.models.files.fingerprint import tokenizer_fingerprint
from draftsmith.models.files.loading import load_tokenizer
from draftsmith.models.target.options import DEFAULTS, TargetOptions
from draftsmith.models.target.prompt_template import OWN_TEMPLATE, TemplateChoice
from draftsmith.models.target.target import Target
from draftsmith.ownership import check_alone, check_unclaimed
from draftsmith.provenance import differences

LOG, SETTINGS, ROWS, ANSWERS, REPORT = "mined.jsonl", "settings.json", "rows.jsonl", "answers.jsonl", "report.json"

Log = list[tuple[MiningResult, tuple[ForwardCounts, ForwardCounts]]]


@dataclass(frozen=True, kw_only=True)
class MiningOptions:
    """How a question is mined.

    Args:
        against: Judge by the target's own answer, or leave out what it does not answer as the prompts' reference does.
        batch_rows: Most questions at the same time; changes no label.
        max_new_tokens: Longest reply, in tokens.
        max_length: An alternative is at most so many times as long as the first answer; default: no such bound.
        stop_on_rejoin: If so many last tokens of an alternative are also in a known answer, assume that it continues like that one. This
            is a guess and gives some wrong labels; default: let the target continue.
        draft_window: Most tokens of a known answer that one forward verifies; changes no label.
        draft_length: Most tokens that the draft guesses ahead of the target; changes no label.
    """

    against: Literal["answer", "reference"] = "answer"
    batch_rows: int = 8
    max_new_tokens: int = 512
    max_length: float | None = None
    stop_on_rejoin: int | None = None
    draft_window: int = 16
    draft_length: int = 5

    def rules(
        self, parse: Parse, tokenizer: PreTrainedTokenizerBase, eos: tuple[int, ...], context: int | None
    ) -> Rules:
        """The rules that a question is mined by.

        Args:
            parse: reads an answer out of a text.
            tokenizer: the target's.
            eos: token ids that end a reply.
            context: most tokens of prompt and reply together; None for no limit.

        Raises:
            ValueError: a setting that is out of range.
        """
        return Rules(
            parse=lambda reply: parse(_decode(tokenizer, reply)),
            eos_token_ids=eos,
            max_new_tokens=self.max_new_tokens,
            against=self.against,
            max_length=self.max_length,
            stop_on_rejoin=self.stop_on_rejoin,
            context=context,
            draft_window=self.draft_window,
            draft_length=self.draft_length,
        )

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that labels depend on."""
        names = ("against", "max_new_tokens", "max_length", "stop_on_rejoin")
        return {name: getattr(self, name) for name in names}


MINING = MiningOptions()


def mine(
    target: str,
    draft: str,
    prompts: Path,
    out: Path,
    checker: str = "final-number",
    limit: int | None = None,
    licence: str = "unknown",
    mining: Annotated[MiningOptions, FLAT] = MINING,
    where: Annotated[TargetOptions, FLAT] = DEFAULTS,
    rendering: Annotated[TemplateChoice, FLAT] = OWN_TEMPLATE,
) -> None:
    """Find out which tokens of a draft LM leave the target's answer right (AutoJudge, arXiv:2504.20039).

    Wherever the draft would write another token than the target's own greedy answer, the command puts that token in and lets the target
    continue. If the target comes to the same answer, the token is correct (1) and stays; otherwise it is wrong (0). Writes OUT/rows.jsonl
    (token rows for a judge), OUT/answers.jsonl (the same as text, for a label store) and OUT/report.json. To resume a killed run, repeat
    the command: it starts behind the last finished question.

    Args:
        target: Path or hub id of the target.
        draft: Path or hub id of a causal LM with the target's tokenizer.
        prompts: JSON lines with `messages` or `prompt_ids`, or the folder that `data prompts` wrote.
        out: The folder to write.
        checker: How an answer is read out of a reply: final-number or multiple-choice. Or what judges a reply by its question's row,
            with `against` reference: embedded, unit-tests, or a function of yours as package.module:function or
            file.py:function.
        limit: Mine the first so many questions only.
        licence: Licence of the questions, where their rows name none.
        mining: How a question is mined; see `MiningOptions`.
        where: Where the target runs; see `TargetOptions`. The draft runs on the same device in the same dtype.
        rendering: The chat template; see `TemplateChoice`.
    """
    check_unclaimed(out)
    where = where.resolved(target)
    parse, judge = _reading(checker, mining.against)
    tokenizer = where.tokenizer(target)
    check_tokenizers(tokenizer, load_tokenizer(draft, trust_remote_code=where.trust_remote_code), target, draft)
    settings = reply_settings(target, tokenizer, reply=ReplyOptions(max_new_tokens=mining.max_new_tokens), where=where)
    _refuse_other_replies(settings, target)
    chat = ChatTemplate(tokenizer, rendering.template, settings.eos_token_ids, rendering.options)
    models = where.load(target), _draft_options(where).load(draft)
    rules = mining.rules(parse, tokenizer, settings.eos_token_ids, models[0].max_positions)

    def fit(question_row: QuestionRow) -> QuestionRow:
        check_questions([question_row.question], rules)
        return question_row if judge is None else judged_by(judge, question_row, partial(_decode, tokenizer))

    questions = read_questions(prompts, chat, parse, models[0].ends.vocab_size, limit, fit)
    identity = _identity(models, tokenizer, chat, settings, mining, where) | rendering.recorded
    identity["checker"] = checker if judge is None else judge.code
    with exclusive(out / LOG):
        _begin(out, identity)
        log = _mine(out, Miner(*models, rules, mining.batch_rows), questions)
        config = identity | vars(mining) | {"target": target, "draft": draft, "limit": limit, "licence": licence}
        record = provenance.record(provenance.command_line(), config, {str(prompts): _digest(questions)})
        report = write_outputs(out, questions, log, tokenizer, models[0].name, licence)
        atomic_write(out / REPORT, json_text(record | report, indent=2) + "\n")
    _tell(out, report)


def _draft_options(where: TargetOptions) -> TargetOptions:
    """The draft runs where the target does; files and adapters are its own."""
    return TargetOptions(device=where.device, dtype=where.dtype, trust_remote_code=where.trust_remote_code)


def _identity(
    models: tuple[Target, Target],
    tokenizer: PreTrainedTokenizerBase,
    chat: ChatTemplate,
    settings: GenerationSettings,
    mining: MiningOptions,
    where: TargetOptions,
) -> dict[str, Any]:
    """What the labels depend on, besides the checker and the template's variables."""
    return {
        "target_fingerprint": models[0].fingerprint,
        "draft_fingerprint": models[1].fingerprint,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "template": chat.digest,
        "eos_token_ids": list(settings.eos_token_ids),
        **mining.identity,
        "dtype": where.dtype,
        "quantization": where.quantization,
        "context": where.context,
    }


def _refuse_other_replies(settings: GenerationSettings, target: str) -> None:
    """Stops with an error where the target's generation config asks for other replies: mining reads the likeliest tokens alone."""
    unsupported = [] if settings.constraints is None else [*settings.constraints.asked()]
    unsupported += ["repetition_penalty"] if settings.repetition_penalty != 1.0 else []
    unsupported += ["stop_strings"] if settings.stop_strings else []
    if unsupported:
        raise ValueError(
            f"the generation config of {target} sets {', '.join(unsupported)}, which mining does not honour: it takes the likeliest token "
            "everywhere; ignore that file with --generation_config none"
        )


def _reading(checker: str, against: str) -> tuple[Parse, Checker | None]:
    """How replies are read; with a checker that judges them, nothing is read without it."""
    if checker in get_args(ParserName):
        return answer_parser(checker), None
    judge = load_checker(checker)
    if against != "reference":
        raise ValueError(
            f"checker is {checker!r} and against is {against!r}; this checker says whether a reply is right, so two wrong ones are not "
            "the same answer; add --against reference"
        )
    return lambda text: None, judge


def check_tokenizers(
    target: PreTrainedTokenizerBase, draft: PreTrainedTokenizerBase, target_name: str, draft_name: str
) -> None:
    """Checks that token ids mean the same to both models.

    Args:
        target: the target's tokenizer.
        draft: the draft's tokenizer.
        target_name: for the message.
        draft_name: for the message.

    Raises:
        ValueError: the tokenizers differ; names the first difference.
    """
    if tokenizer_fingerprint(target) == tokenizer_fingerprint(draft):
        return
    theirs, ours = ({number: token for token, number in tokenizer.get_vocab().items()} for tokenizer in (target, draft))
    first = next((number for number in sorted({*theirs, *ours}) if theirs.get(number) != ours.get(number)), None)
    difference = "their special tokens differ"
    if first is not None:
        difference = f"token {first} is {theirs.get(first)!r} in the target's and {ours.get(first)!r} in the draft's"
    raise ValueError(
        f"the draft {draft_name} has another tokenizer than the target {target_name}: {difference}; mining swaps token ids, which must "
        "mean the same; use a draft of the target's own model family, with its tokenizer"
    )


def write_outputs(
    out: Path, questions: Sequence[QuestionRow], log: Log, tokenizer: PreTrainedTokenizerBase, model: str, licence: str
) -> dict[str, Any]:
    """Writes rows and answers in the order of the questions.

    Args:
        out: the folder.
        questions: that were mined.
        log: their outcomes, in the same order.
        tokenizer: the target's.
        model: the target's name.
        licence: of questions whose rows name none.

    Returns:
        the report's counts.
    """
    by_id = {mined.id: mined for mined, _ in log}
    pairs = [(entry, by_id[entry.question.id]) for entry in questions]
    write_rows(out / ROWS, [row for entry, mined in pairs for row in token_rows(entry, mined)])
    answers, num_without = [], 0
    for entry, mined in pairs:
        labelled, missing = labelled_answers(entry, mined, lambda reply: _decode(tokenizer, reply), model, licence)
        answers += labelled
        num_without += missing
    write_answers(out / ANSWERS, answers)
    return counts(log) | {"answers": len(answers), "swaps_without_answer": num_without}


def _mine(out: Path, miner: Miner, questions: Sequence[QuestionRow]) -> Log:
    """Mines what the log does not hold yet; gives the log of the questions asked, in their order."""
    with JsonlAppender(out / LOG) as appender:
        there = {row["id"]: row for row in appender.rows}
        for entry in questions:
            row = there.get(entry.question.id)
            if row is not None and row["prompt_ids"] != entry.question.prompt_ids:
                raise ValueError(
                    f"{out / LOG} holds a question {entry.question.id!r} with another prompt; an id stands for one question; name "
                    "another folder or delete this one"
                )
        waiting = [entry.question for entry in questions if entry.question.id not in there]
        with progress("mine", len(questions), "questions", done=len(questions) - len(waiting)) as advance:
            for mined, spent in _spent(miner, miner.mine(waiting)):
                appender.write(to_log(mined, spent))
                advance(1)
        rows = {row["id"]: row for row in appender.rows}
    return [from_log(rows[entry.question.id]) for entry in questions]


def _spent(miner: Miner, outcomes: Iterator[MiningResult]) -> Iterator[tuple[MiningResult, list[ForwardCounts]]]:
    """With each outcome, the forwards since the one before, so that their sum over a log is what its questions took."""
    before: tuple[ForwardCounts, ForwardCounts] = ForwardCounts(), ForwardCounts()
    for mined in outcomes:
        now = miner.forwards()
        yield mined, [new.since(old) for new, old in zip(now, before, strict=True)]
        before = now


def _begin(out: Path, identity: dict[str, Any]) -> None:
    """Writes what this run is, or checks that an earlier one was the same."""
    path = out / SETTINGS
    if not path.exists():
        for name in (LOG, ROWS, ANSWERS, REPORT):
            check_alone(out / name, path)
        atomic_write(path, json.dumps(identity, indent=2) + "\n")
        return
    earlier = parse_json_object(path.read_bytes(), str(path), "name another folder")
    wrong = differences(earlier, identity)
    if wrong:
        raise ValueError(
            f"{out} holds labels of another run ({'; '.join(wrong)}); name another folder or delete this one"
        )


def _decode(tokenizer: PreTrainedTokenizerBase, reply: list[int]) -> str:
    return str(tokenizer.decode(reply, skip_special_tokens=True))


def _digest(questions: Sequence[QuestionRow]) -> str:
    return hashlib.sha256(json.dumps([entry.question.prompt_ids for entry in questions]).encode()).hexdigest()


def _tell(out: Path, report: dict[str, Any]) -> None:
    labels = report["labels"]
    print(
        f"{labels['correct'] + labels['wrong']} labels of {report['mined']} questions in {out}: {labels['correct']} correct, "
        f"{labels['wrong']} wrong; {report['target']['forwards']} forwards of the target, {report['draft']['forwards']} of the draft"
    )
    for reason, count in report["left_out"].items():
        print(visible(f"left out: {count} questions: {reason}"))
    if report["swaps_without_answer"]:
        print(f"{report['swaps_without_answer']} labels are in {ROWS} only: their token is no characters of its own")

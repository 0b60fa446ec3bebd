"""The command `draftsmith label generate`: questions times models, every answer checked, the labelled answers kept.

Owns which models answer which questions how often, what is left out, the pairs, and what is printed. Answering is `data`'s work,
judging a checker's. Knows no format but this project's own.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from transformers import PreTrainedTokenizerBase

from draftsmith import provenance
from draftsmith.arguments import FLAT, WHOLE
from draftsmith.data.formats import Message
from draftsmith.data.prompts import PROMPT_FILE, Prompt, read_prompts, say_dropped
from draftsmith.data.replies.reply_settings import Overrides, reply_settings
from draftsmith.data.replies.reply_sources import BundledEngine
from draftsmith.data.replies.respond import Share, make_plan, write_replies
from draftsmith.data.tokens import ChatTemplate
from draftsmith.files import JsonlAppender, exclusive, read_jsonl, sha256_file
from draftsmith.json_rows import Dropped, summary
from draftsmith.label.checkers.checkers import Checked, Checker, Row, load_checker
from draftsmith.label.schema import Answer, Label, answer_id, check_answer, write_answers
from draftsmith.label.store.store import Store
from draftsmith.models.files.fingerprint import tokenizer_fingerprint
from draftsmith.models.files.loading import load_tokenizer
from draftsmith.models.target.options import DEFAULTS, TargetOptions
from draftsmith.models.target.prompt_template import NO_OPTIONS, TemplateOptions
from draftsmith.ownership import check_alone, check_begun, check_unclaimed

CHECKS = "checks.jsonl"
_LEFT_OUT = ("unfinished", "empty", "repeated")
_ENDED = ("eos", "stop")


@dataclass(frozen=True)
class Question:
    """A prompt, the whole row it stands in, where that is, and the licence of its source."""

    prompt: Prompt
    row: Row
    place: str
    licence: str


@dataclass(frozen=True)
class Asking:
    """How every model answers; one greedy answer, and `samples` drawn ones that depend on `seed`."""

    greedy: bool
    samples: int
    temperature: float
    top_k: int | None
    top_p: float | None
    max_new_tokens: int
    seed: int
    stop: tuple[str, ...]
    template: str | None
    batch_rows: int
    batch_tokens: int
    dtype: str
    rendering: TemplateOptions = NO_OPTIONS

    def __post_init__(self) -> None:
        if self.samples < 0 or not (self.greedy or self.samples):
            raise ValueError(
                f"samples is {self.samples}; a model gives at least one answer; raise it, or leave greedy on"
            )
        if self.samples and self.temperature <= 0:
            raise ValueError(
                f"temperature is {self.temperature}; samples are drawn above 0; raise it, or drop --samples"
            )

    def runs(self, model: str) -> Iterator[tuple[str, Overrides, int]]:
        """Name, settings and seed of each of a model's answers to one question."""
        if self.greedy:
            yield "greedy", Overrides(temperature=0.0), self.seed
        for number in range(1, self.samples + 1):
            # Models that share their noise would make the same slips.
            digest = hashlib.sha256(f"{self.seed}\0{model}\0{number}".encode()).digest()
            yield (
                f"sample-{number:03d}",
                Overrides(self.temperature, self.top_k, self.top_p),
                int.from_bytes(digest[:4], "big"),
            )


@dataclass
class Tally:
    """What became of each model's answers: verdicts, and reasons to leave one out."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, model: str, kind: str) -> None:
        """Counts one."""
        self.counts.setdefault(model, Counter())[kind] += 1

    def lines(self) -> Iterator[str]:
        """One line a model: `embedded:target: 9 correct, 1 wrong; left out: 2 repeated`."""
        for model, counts in self.counts.items():
            left_out = _told(counts, _LEFT_OUT)
            yield f"{model}: {_told(counts, ('correct', 'wrong', 'unplaced'))}" + (
                f"; left out: {left_out}" if left_out != "none" else ""
            )


def generate(
    prompts: Path,
    models: tuple[str, ...],
    checker: str,
    out: Path,
    store: str | None = None,
    licence: str | None = None,
    pairs: bool = False,
    split: str | None = None,
    limit: int | None = None,
    greedy: bool = True,
    samples: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    max_new_tokens: int = 256,
    seed: int = 0,
    stop: Annotated[tuple[str, ...], WHOLE] = (),
    template: str | None = None,
    batch_rows: int = 64,
    batch_tokens: int = 32768,
    test_seconds: float = 5.0,
    unprotected: bool = False,
    author: str | None = None,
    dtype: str = "float32",
    where: Annotated[TargetOptions, FLAT] = DEFAULTS,
    rendering: Annotated[TemplateOptions, FLAT] = NO_OPTIONS,
) -> None:
    """Lets several models answer questions, checks every answer, and keeps the labelled answers.

    Writes OUT/answers.jsonl, and the same into a store where one is named. A killed run continues where it was when it is
    started again: no reply is generated and no answer checked twice. Replies that did not come to their end are left out.

    Args:
        prompts: a prompt file with reference answers, as `embedded prompts` or `data prompts` write.
        models: paths or hub ids of the models that answer.
        checker: final-number, multiple-choice, unit-tests, embedded, or a function of yours as package.module:function or
            file.py:function.
        out: the folder of replies, checks and answers.
        store: path of a store (SQLite, made when absent), or an SQLAlchemy URL, that the answers are added to.
        licence: the licence of the questions, where their rows do not say it.
        pairs: keep one right and one wrong answer of each question that has both, and nothing else.
        split: ask only the questions of this split.
        limit: ask the first so many questions only.
        greedy: one answer of each model is its likeliest, token by token.
        samples: how many drawn answers each model gives besides.
        temperature: of the drawn answers.
        top_k: draw among the k likeliest tokens; 0 for all; default: the model's own.
        top_p: draw within this probability mass; default: the model's own.
        max_new_tokens: longest reply of a turn.
        seed: of drawing answers, and of choosing pairs.
        stop: strings that end a reply.
        template: Jinja file, or `none` for plain text; default: each tokenizer's own.
        batch_rows: most questions in a batch.
        batch_tokens: most tokens in a batch, room for replies included.
        test_seconds: longest that the unit tests of one answer may take.
        unprotected: run unit tests even where this system cannot keep them from your files and processes.
        author: who adds to the store, for its log; default: the user of this process.
        dtype: dtype the models run in.
        where: the models' devices, revision, adapter and quantization; see `TargetOptions`.
        rendering: the chat template's name and variables; see `TemplateOptions`.
    """
    check_unclaimed(out)
    asking = Asking(
        greedy,
        samples,
        temperature,
        top_k,
        top_p,
        max_new_tokens,
        seed,
        stop,
        template,
        batch_rows,
        batch_tokens,
        dtype,
        rendering,
    )
    _check_models(models, where)
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1; raise it, or leave it out")
    adder = "" if store is None else author or _user()
    checking = load_checker(checker, test_seconds, unprotected)
    questions = _questions(prompts, split, limit, licence, checking)
    tokenizers = {
        model: load_tokenizer(model, where.revision, where.trust_remote_code) for model in models
    }  # the last name is checked before the first answer
    with exclusive(out / "answers.jsonl"):
        check_begun(out / CHECKS, "key")
        check_alone(out / "answers.jsonl", out / CHECKS)
        folders = [
            (model, folder)
            for model, tokenizer in tokenizers.items()
            for folder in _ask(model, tokenizer, questions, asking, where, out)
        ]
        tally = Tally()
        answers = list(_labelled(questions, folders, checking, out, tally))
        kept = _pairs(answers, seed) if pairs else [answer for _, answer in answers]
        write_answers(out / "answers.jsonl", kept)
        config = asdict(asking) | {"prompts": prompts, "models": models, "checker": checker, "pairs": pairs}
        config |= {"split": split, "limit": limit, "licence": licence, "where": where, "test_seconds": test_seconds}
        inputs = {str(prompts): sha256_file(_file(prompts))}
        provenance.write(out, provenance.record("label generate", config, inputs))
    for line in tally.lines():
        print(line)
    print(f"{len(kept)} answers to {len(questions)} questions in {out / 'answers.jsonl'}: {_verdicts(kept)}")
    if pairs:
        print(f"pairs: {len(kept) // 2}; {len(questions) - len(kept) // 2} questions lack a right or a wrong answer")
    if store is not None:
        with Store(store, create=True) as opened:
            added = opened.add(kept, adder)
            print(f"{opened.name}: {added.items} new answers and {added.labels} new labels")


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError) as error:
        raise ValueError("this process's user has no name; say who adds to the store with --author") from error


def _check_models(models: Sequence[str], where: TargetOptions) -> None:
    if not models or len(set(models)) != len(models):
        raise ValueError(f"models is {', '.join(models) or 'empty'}; name at least one model, and each once")
    if len(models) > 1 and (where.revision or where.adapter):
        raise ValueError(
            "a revision or an adapter belongs to one model, and several are named; run them one after the other, each with "
            "an --out of its own, and the same --store"
        )


def _questions(
    prompts: Path, split: str | None, limit: int | None, licence: str | None, checker: Checker
) -> list[Question]:
    """The questions, each shown to the checker before any model is loaded. The others are counted on standard error.

    Raises ValueError, naming the first line and its reason, when none is left.
    """
    file = _file(prompts)
    rows = {f"{file}:{line}": row for line, row in read_jsonl(file, [])}  # `read_prompts` tells of those left out
    found: list[Question] = []
    dropped: list[Dropped] = []
    for prompt in read_prompts(prompts, split)[:limit]:
        try:
            found.append(_question(prompt, rows[prompt.place], licence, checker))
        except ValueError as error:
            dropped.append(Dropped(prompt.place, str(error), id=prompt.id))
    if not found:
        raise ValueError(f"no question in {file}: {summary(dropped)}")
    say_dropped(dropped)
    return found


def _question(prompt: Prompt, row: Row, licence: str | None, checker: Checker) -> Question:
    """Raises ValueError: no licence, a document in place of a question, or a row the checker cannot judge by."""
    own = licence if row.get("licence") is None else row["licence"]
    if own is None:
        raise ValueError("the licence is not in the row; it goes with every answer; give it with --licence")
    if not isinstance(own, str) or not own.strip():
        raise ValueError(f"the licence is {own!r:.80}, not text; correct it")
    if prompt.text is not None:
        raise ValueError(f"{prompt.id} is a document, not a question; take prompts with messages")
    asked: dict[str, Any] = {"messages": [dict(message) for message in prompt.messages]}
    if prompt.reference:
        asked["reference"] = list(prompt.reference)
    whole = {**row, **asked}  # as a checker expects them, however the row writes them
    if checker.probed:
        checker.check(whole, "")
    return Question(prompt, whole, prompt.place, own)


def _ask(
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    asking: Asking,
    where: TargetOptions,
    out: Path,
) -> list[Path]:
    """Lets a model answer what it has not answered yet; gives the folders of its replies, one a run."""
    loaded = where.load(model, asking.dtype)
    engine = BundledEngine(loaded, tokenizer=tokenizer)
    asked = [question.prompt for question in questions]
    folders = []
    for name, overrides, seed in asking.runs(model):
        settings = reply_settings(
            model,
            tokenizer,
            overrides,
            asking.max_new_tokens,
            seed,
            asking.stop,
            where.revision,
            where.trust_remote_code,
            where.generation_config,
        )
        chat = ChatTemplate(tokenizer, asking.template, settings.eos_token_ids, asking.rendering)
        plan = make_plan(asked, chat, settings, loaded.max_positions, asking.batch_rows, asking.batch_tokens)
        identity = {
            "target_fingerprint": loaded.fingerprint,
            "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
            "prompts_sha256": _digest([prompt.fields() for prompt in asked]),
            "template": chat.digest,
            "settings": json.loads(json.dumps(asdict(settings))),
            "batch_rows": asking.batch_rows,
            "batch_tokens": asking.batch_tokens,
            "dtype": asking.dtype,
        }
        if asking.rendering != NO_OPTIONS:
            identity |= asdict(asking.rendering)
        if where.quantization is not None:
            identity["quantization"] = where.quantization
        if where.context is not None:
            identity["context"] = where.context
        folders.append(out / "replies" / _folder_name(model) / name)
        write_replies(folders[-1], Share(), plan, chat, engine, identity)
    return folders


def _labelled(
    questions: Sequence[Question], folders: Sequence[tuple[str, Path]], checker: Checker, out: Path, tally: Tally
) -> Iterator[tuple[str, Answer]]:
    """Question ids with labelled answers, question by question; the same text of the same model only once."""
    replies = [
        (model, {row["id"]: row for _, row in read_jsonl(folder / "responses.jsonl")}) for model, folder in folders
    ]
    seen: set[str] = set()
    with JsonlAppender(out / CHECKS) as log:
        known: dict[str, Row] = {row["key"]: row for row in log.rows}
        for question in questions:
            for model, rows in replies:
                answer = _answer(question, model, rows.get(question.prompt.id))
                kind = answer if isinstance(answer, str) else "repeated" if answer.id in seen else None
                if isinstance(answer, str) or kind is not None:
                    tally.add(model, str(kind))
                    continue
                seen.add(answer.id)
                place = f"{question.place} (question {question.prompt.id}, answer of {model})"
                labelled = _with_label(answer, question, checker, log, known, place)
                assert labelled.label is not None
                tally.add(model, labelled.label.verdict)
                yield question.prompt.id, labelled


def _answer(question: Question, model: str, reply: Row | None) -> Answer | str:
    """The answer in a reply, or why there is none."""
    if reply is None or len(reply["turns"]) < len(question.prompt.user_turns()):
        return "unfinished"
    if any(turn["finish"] not in _ENDED for turn in reply["turns"]):
        return "unfinished"
    *asked, said = reply["messages"]
    if not said["content"].strip():
        return "empty"
    messages = tuple(Message(role=message["role"], content=message["content"]) for message in asked)
    source = question.prompt.source
    own_id = answer_id(source, messages, said["content"], model)
    return Answer(own_id, messages, said["content"], model, question.licence, source)


def _with_label(
    answer: Answer, question: Question, checker: Checker, log: JsonlAppender, known: dict[str, Row], place: str
) -> Answer:
    """Checks an answer, or recalls what an earlier run was told by the same checker for the same row and response."""
    key = _digest([checker.code, question.row, answer.response])
    if key not in known:
        checked = _checked(checker, question.row, answer.response, place)
        known[key] = {"key": key} | asdict(checked)
        _apply(answer, checker, checked, place)
        log.write(dict(known[key]))
    row = known[key]
    error = None if row["error"] is None else (row["error"][0], row["error"][1])
    return _apply(answer, checker, Checked(row["verdict"], error, row["note"]), place)


def _apply(answer: Answer, checker: Checker, checked: Checked, place: str) -> Answer:
    label = Label(checked.verdict, checker.name, "rule", checked.error, None, checked.note)
    labelled = Answer(answer.id, answer.messages, answer.response, answer.model, answer.licence, answer.source, label)
    check_answer(labelled, place)
    return labelled


def _checked(checker: Checker, row: Row, response: str, place: str) -> Checked:
    try:
        return checker.check(row, response)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _pairs(answers: Sequence[tuple[str, Answer]], seed: int) -> list[Answer]:
    """One right and one wrong answer of each question that has both.

    A wrong one whose error is placed comes before one that is only wrong somewhere. Among equals the choice is by a hash, so no model
    comes first.
    """
    by_question: dict[str, list[Answer]] = {}
    for question, answer in answers:
        by_question.setdefault(question, []).append(answer)
    kept = []
    for found in by_question.values():
        found.sort(key=lambda answer: hashlib.sha256(f"{seed}\0{answer.id}".encode()).digest())
        by_verdict = {answer.label.verdict: answer for answer in reversed(found) if answer.label is not None}
        wrong = by_verdict.get("wrong") or by_verdict.get("unplaced")
        if wrong is not None and "correct" in by_verdict:
            kept += [by_verdict["correct"], wrong]
    return kept


def _file(prompts: Path) -> Path:
    return prompts / PROMPT_FILE if prompts.is_dir() else prompts


def _folder_name(model: str) -> str:
    """A folder of its own for any name of a model: `embedded:target` gives `embedded-target-` and eight digits."""
    plain = re.sub(r"[^\w.-]+", "-", model).strip("-.")[-60:]
    return f"{plain}-{hashlib.sha256(model.encode()).hexdigest()[:8]}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False, default=str).encode()).hexdigest()


def _verdicts(answers: Sequence[Answer]) -> str:
    counts = Counter(answer.label.verdict for answer in answers if answer.label is not None)
    return _told(counts, ("correct", "wrong", "unplaced"))


def _told(counts: Counter[Any], kinds: Sequence[str]) -> str:
    return ", ".join(f"{counts[kind]} {kind}" for kind in kinds if counts[kind]) or "none"

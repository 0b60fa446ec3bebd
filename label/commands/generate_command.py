"""The command `draftsmith label generate`: questions times models, every answer checked, the labelled answers kept.

Owns which models answer which questions how often, and what is printed. Answering is `data`'s work, judging a checker's. Knows no
format but this project's own.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from transformers import PreTrainedTokenizerBase

from draftsmith import provenance
from draftsmith.arguments import FLAT
from draftsmith.data.chat_template import ChatTemplate
from draftsmith.data.prompts import ALL_PROMPTS, PROMPT_FILE, Prompt, PromptSelection, read_prompts, say_dropped
from draftsmith.data.replies.reply_files import loaded_here, run_identity, write_replies
from draftsmith.data.replies.reply_plan import BatchOptions, make_plan
from draftsmith.data.replies.reply_settings import SamplingOverrides, reply_settings
from draftsmith.data.replies.reply_sources import BundledEngine
from draftsmith.data.replies.respond import REPLY
from draftsmith.data.shared_work import Share
from draftsmith.decode.decode_command import NO_STOP_STRINGS, EndingOptions
from draftsmith.decode.sampling import ReplyOptions
from draftsmith.files import exclusive, read_jsonl, sha256_file
from draftsmith.json_rows import Dropped, summary
from draftsmith.label.answer_rows import write_answers
from draftsmith.label.checkers.checkers import Checker, Row, load_checker
from draftsmith.label.commands.checked_answers import (
    CHECKS,
    LicensedPrompt,
    Tally,
    digest,
    labelled_answers,
    right_and_wrong,
    verdicts,
)
from draftsmith.label.commands.entry_options import UNNAMED, EntryOptions
from draftsmith.label.schema import Answer
from draftsmith.label.store.store import Store
from draftsmith.models.target.options import DEFAULTS, TargetOptions
from draftsmith.models.target.prompt_template import OWN_TEMPLATE, TemplateChoice
from draftsmith.ownership import check_alone, check_begun, check_unclaimed

ANSWERS = "answers.jsonl"


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """How many answers each model gives to a question.

    Args:
        greedy: One answer of each model is its likeliest, token by token.
        samples: How many drawn answers each model gives besides.

    Raises:
        ValueError: a model would give no answer.
    """

    greedy: bool = True
    samples: int = 0

    def __post_init__(self) -> None:
        if self.samples < 0 or not (self.greedy or self.samples):
            raise ValueError(
                f"samples is {self.samples}; a model gives at least one answer; raise it, or leave greedy on"
            )


@dataclass(frozen=True, kw_only=True)
class UnitTestOptions:
    """How unit tests of an answer are run, by the checker unit-tests.

    Args:
        test_seconds: Longest that the unit tests of one answer may take.
        unprotected: Run unit tests even where this system cannot keep them from your files and processes.
    """

    test_seconds: float = 5.0
    unprotected: bool = False


ONE_ANSWER = AnswerOptions()
PROTECTED = UnitTestOptions()
DRAWN = SamplingOverrides(temperature=1.0)
LARGE_BATCHES = BatchOptions(batch_rows=64, batch_tokens=32768)


@dataclass(frozen=True)
class AnswerPlan:
    """How every model answers.

    Attributes:
        answers: how often.
        sampling: of the drawn answers.
        reply: length and seed.
        stop: strings that end a reply.
        batches: how many questions are answered together.
        rendering: the chat template.

    Raises:
        ValueError: drawn answers at a temperature of 0.
    """

    answers: AnswerOptions
    sampling: SamplingOverrides
    reply: ReplyOptions
    stop: tuple[str, ...]
    batches: BatchOptions
    rendering: TemplateChoice

    def __post_init__(self) -> None:
        if self.answers.samples and (self.sampling.temperature or 0.0) <= 0:
            raise ValueError(
                f"temperature is {self.sampling.temperature}; samples are drawn above 0; raise it, or drop --samples"
            )

    def runs(self, model: str) -> Iterator[tuple[str, SamplingOverrides, ReplyOptions]]:
        """The answers of a model to one question.

        Args:
            model: its name, which is part of the noise.

        Yields:
            name and settings of each answer.
        """
        if self.answers.greedy:
            greedy = SamplingOverrides(temperature=0.0, repetition_penalty=self.sampling.repetition_penalty)
            yield "greedy", greedy, self.reply
        for number in range(1, self.answers.samples + 1):
            # Models that share their noise would make the same slips.
            seed = hashlib.sha256(f"{self.reply.seed}\0{model}\0{number}".encode()).digest()
            yield f"sample-{number:03d}", self.sampling, replace(self.reply, seed=int.from_bytes(seed[:4], "big"))

    @property
    def recorded(self) -> dict[str, Any]:
        """Every setting by the name of its option."""
        groups = (self.answers, self.sampling, self.reply, self.batches, self.rendering)
        settings = {name: value for group in groups for name, value in asdict(group).items()}
        return settings | {"stop": self.stop}


def generate(
    prompts: Path,
    models: tuple[str, ...],
    checker: str,
    out: Path,
    store: str | None = None,
    pairs: bool = False,
    selection: Annotated[PromptSelection, FLAT] = ALL_PROMPTS,
    answers: Annotated[AnswerOptions, FLAT] = ONE_ANSWER,
    sampling: Annotated[SamplingOverrides, FLAT] = DRAWN,
    reply: Annotated[ReplyOptions, FLAT] = REPLY,
    ending: Annotated[EndingOptions, FLAT] = NO_STOP_STRINGS,
    batches: Annotated[BatchOptions, FLAT] = LARGE_BATCHES,
    tests: Annotated[UnitTestOptions, FLAT] = PROTECTED,
    entry: Annotated[EntryOptions, FLAT] = UNNAMED,
    where: Annotated[TargetOptions, FLAT] = DEFAULTS,
    rendering: Annotated[TemplateChoice, FLAT] = OWN_TEMPLATE,
) -> None:
    """Lets several models answer questions, checks every answer, and keeps the labelled answers.

    Writes OUT/answers.jsonl, and the same into a store where you name one. To resume a run, start the same command again: it generates
    no reply and checks no answer twice. Replies that were cut off at their longest length are left out.

    Args:
        prompts: A prompt file with reference answers, as `embedded prompts` or `data prompts` write.
        models: Paths or hub ids of the models that answer.
        checker: final-number, multiple-choice, unit-tests, embedded, or a function of yours as package.module:function or
            file.py:function.
        out: The folder of replies, checks and answers.
        store: Path of a store (SQLite, made when absent), or an SQLAlchemy URL, that the answers are added to.
        pairs: Keep one right and one wrong answer of each question that has both, and nothing else.
        selection: Which questions; see `PromptSelection`.
        answers: How many answers; see `AnswerOptions`.
        sampling: How the drawn answers are drawn; see `SamplingOverrides`.
        reply: Length and seed; see `ReplyOptions`. The seed also chooses the pairs.
        ending: What ends a reply early; see `EndingOptions`.
        batches: How many questions are answered together; see `BatchOptions`.
        tests: How unit tests are run; see `UnitTestOptions`.
        entry: Licence of the questions, and who adds to the store; see `EntryOptions`.
        where: Where the models run; see `TargetOptions`.
        rendering: The chat template; see `TemplateChoice`.
    """
    check_unclaimed(out)
    asking = AnswerPlan(answers, sampling, reply, ending.stop, batches, rendering)
    _check_models(models, where)
    adder = "" if store is None else entry.adder()
    checking = load_checker(checker, tests.test_seconds, tests.unprotected)
    questions = licensed_questions(prompts, selection, entry.licence, checking)
    config = asking.recorded | vars(selection) | {"prompts": prompts, "models": models, "checker": checker}
    config |= {"pairs": pairs, "licence": entry.licence, "where": where.placed(), "test_seconds": tests.test_seconds}
    config["dtype"] = {model: where.resolve_dtype(model, where.dtype) for model in models}
    inputs = {str(prompts): sha256_file(_file(prompts))}
    with exclusive(out / ANSWERS):
        kept, tally = _answers(questions, models, checking, asking, where, out, pairs)
        provenance.write(out, provenance.record("label generate", config, inputs))
    _report(out, kept, tally, len(questions), pairs)
    if store is not None:
        _add(store, kept, adder)


def _answers(
    questions: Sequence[LicensedPrompt],
    models: Sequence[str],
    checker: Checker,
    asking: AnswerPlan,
    where: TargetOptions,
    out: Path,
    pairs: bool,
) -> tuple[list[Answer], Tally]:
    """Makes and checks what is not there yet, and writes all answers that are kept."""
    # The last model's name is checked before the first answer.
    tokenizers = {model: where.tokenizer(model) for model in models}
    tally = Tally()
    check_begun(out / CHECKS, "key")
    check_alone(out / ANSWERS, out / CHECKS)
    folders = [
        (model, folder)
        for model, tokenizer in tokenizers.items()
        for folder in _ask(model, tokenizer, questions, asking, where.resolved(model), out)
    ]
    labelled = list(labelled_answers(questions, folders, checker, out, tally))
    kept = right_and_wrong(labelled, asking.reply.seed) if pairs else [answer for _, answer in labelled]
    write_answers(out / ANSWERS, kept)
    return kept, tally


def _report(out: Path, kept: Sequence[Answer], tally: Tally, num_questions: int, pairs: bool) -> None:
    for line in tally.lines():
        print(line)
    print(f"{len(kept)} answers to {num_questions} questions in {out / ANSWERS}: {verdicts(kept)}")
    if pairs:
        print(f"pairs: {len(kept) // 2}; {num_questions - len(kept) // 2} questions lack a right or a wrong answer")


def _add(store: str, kept: Sequence[Answer], adder: str) -> None:
    with Store(store, create=True, with_first_rows=True) as opened:
        added = opened.add(kept, adder)
        print(f"{opened.name}: {added.items} new answers and {added.labels} new labels")


def _check_models(models: Sequence[str], where: TargetOptions) -> None:
    if not models or len(set(models)) != len(models):
        raise ValueError(f"models is {', '.join(models) or 'empty'}; name at least one model, and each once")
    if len(models) > 1 and (where.revision or where.adapter):
        raise ValueError(
            "a revision or an adapter belongs to one model, and several are named; run them one after the other, each with "
            "an --out of its own, and the same --store"
        )


def licensed_questions(
    prompts: Path, selection: PromptSelection, licence: str | None, checker: Checker | None
) -> list[LicensedPrompt]:
    """The questions. The checker sees each of them before any model is loaded. The others are counted on standard error.

    Args:
        prompts: a prompt file, or a folder with one.
        selection: which of them.
        licence: of those whose rows do not name one.
        checker: judges the answers; None for people.

    Raises:
        ValueError: none is left; names the first line and its reason.
    """
    file = _file(prompts)
    rows = {f"{file}:{line}": row for line, row in read_jsonl(file, [])}  # `read_prompts` tells of those left out
    usable: list[LicensedPrompt] = []
    dropped: list[Dropped] = []
    for prompt in read_prompts(prompts, selection.split)[: selection.limit]:
        try:
            usable.append(_question(prompt, rows[prompt.place], licence, checker))
        except ValueError as error:
            dropped.append(Dropped(prompt.place, str(error), id=prompt.id))
    if not usable:
        raise ValueError(f"no question in {file}: {summary(dropped)}")
    say_dropped(dropped)
    return usable


def _question(prompt: Prompt, row: Row, licence: str | None, checker: Checker | None) -> LicensedPrompt:
    """A prompt ready to be asked.

    Raises:
        ValueError: no licence, a document in place of a question, or a row that the checker cannot judge by.
    """
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
    if checker is not None and checker.probed:
        checker.check(whole, "")
    return LicensedPrompt(prompt, whole, prompt.place, own)


def _ask(
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[LicensedPrompt],
    asking: AnswerPlan,
    where: TargetOptions,
    out: Path,
) -> list[Path]:
    """Lets a model answer what it has not answered yet; gives the folders of its replies, one for each run."""
    loaded = where.load(model)
    engine = BundledEngine(loaded, tokenizer=tokenizer)
    asked: list[Prompt] = [question.prompt for question in questions]
    folders = []
    for name, overrides, reply in asking.runs(model):
        settings = reply_settings(model, tokenizer, overrides, reply, asking.stop, where)
        rendering = asking.rendering
        chat = ChatTemplate(tokenizer, rendering.template, settings.eos_token_ids, rendering.options)
        plan = make_plan(asked, chat, settings, loaded.max_positions, asking.batches)
        identity = run_identity(tokenizer, chat, settings, rendering, where) | loaded_here(where) | vars(asking.batches)
        identity |= {
            "target_fingerprint": loaded.fingerprint,
            "prompts_sha256": digest([prompt.fields() for prompt in asked]),
        }
        folders.append(out / "replies" / _folder_name(model) / name)
        write_replies(folders[-1], Share(), plan, chat, engine, identity)
    return folders


def _file(prompts: Path) -> Path:
    return prompts / PROMPT_FILE if prompts.is_dir() else prompts


def _folder_name(model: str) -> str:
    """A folder of its own for any name of a model: `embedded:target` gives `embedded-target-` and eight digits."""
    plain = re.sub(r"[^\w.-]+", "-", model).strip("-.")[-60:]
    return f"{plain}-{hashlib.sha256(model.encode()).hexdigest()[:8]}"

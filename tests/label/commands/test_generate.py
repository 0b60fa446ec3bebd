import getpass
import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from draftsmith import cli, provenance
from draftsmith.data.prompts import PromptSelection
from draftsmith.data.replies.reply_plan import BatchOptions
from draftsmith.data.replies.reply_settings import SamplingOverrides
from draftsmith.data.replies.reply_sources import Reply
from draftsmith.decode.sampling import GenerationSettings
from draftsmith.embedded.sums import TARGET_STYLE, distinct_problems, render, write_prompts
from draftsmith.files import read_jsonl
from draftsmith.label.answer_rows import read_answers
from draftsmith.label.commands import generate_command as module
from draftsmith.label.commands.entry_options import EntryOptions
from draftsmith.label.commands.generate_command import AnswerOptions, generate
from draftsmith.label.store.store import Store
from draftsmith.models.target.options import TargetOptions

MODELS = ("embedded:target", "embedded:draft_lm")
Say = Callable[[str, str, GenerationSettings], str]


class Scripted:
    """Answers each question as `say(model, question, settings)` does; an empty text is cut off by the budget.

    Killed, as by Ctrl-C, at the batch after `lives` batches.
    """

    def __init__(self, questions: list[str], say: Say) -> None:
        self.questions, self.say = questions, say
        self.asked: list[tuple[str, str]] = []
        self.settings: list[GenerationSettings] = []
        self.lives = 1000

    def engine(self, loaded: Any, tokenizer: PreTrainedTokenizerBase) -> SimpleNamespace:
        def reply(prompts: list[list[int]], settings: GenerationSettings, request_ids: list[int]) -> list[Reply]:
            if self.lives == 0:
                raise KeyboardInterrupt
            self.lives -= 1
            self.settings.append(settings)
            told = [str(tokenizer.decode(ids)) for ids in prompts]
            found = [next(question for question in self.questions if question in text) for text in told]
            self.asked += [(loaded.name, question) for question in found]
            texts = [self.say(loaded.name, question, settings) for question in found]
            ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
            return [Reply([*one, settings.eos_token_ids[0]], "eos") if one else Reply([5], "length") for one in ids]

        return SimpleNamespace(reply=reply)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    write_prompts(path, "train", 10)
    return path


@pytest.fixture
def script(prompts: Path, monkeypatch: pytest.MonkeyPatch) -> Scripted:
    """The target is always right, the draft LM always wrong in its answer line."""
    problems = {problem.question: problem for problem in distinct_problems("train", 10, 0)}

    def say(model: str, question: str, settings: GenerationSettings) -> str:
        right = render(problems[question], TARGET_STYLE, random.Random(0))
        return right if model == MODELS[0] else right.rpartition("####")[0] + f"#### {problems[question].answer + 1}"

    scripted = Scripted(list(problems), say)
    monkeypatch.setattr(module, "BundledEngine", scripted.engine)

    def load(self: TargetOptions, path: str, dtype: str | None = None) -> SimpleNamespace:
        return SimpleNamespace(name=path, fingerprint=path, max_positions=512)

    monkeypatch.setattr(TargetOptions, "load", load)
    return scripted


def test_every_model_answers_every_question_and_every_answer_is_labelled(
    prompts: Path, tmp_path: Path, script: Scripted, capsys: pytest.CaptureFixture[str]
) -> None:
    out, store = tmp_path / "out", str(tmp_path / "labels.db")
    generate(prompts, MODELS, "embedded", out, store, entry=EntryOptions(licence="CC0-1.0", author="me"))
    told = capsys.readouterr().out
    assert "embedded:target: 10 correct\n" in told
    assert "embedded:draft_lm: 10 wrong\n" in told
    assert "20 answers to 10 questions" in told
    answers = list(read_answers(out / "answers.jsonl"))
    assert len(answers) == 20
    rights = {row["messages"][0]["content"]: str(row["answer"]) for _, row in read_jsonl(prompts)}
    for answer in answers:
        assert answer.label is not None
        assert (answer.licence, answer.label.how, answer.label.labelled_by) == ("CC0-1.0", "rule", "embedded")
        assert answer.source.startswith("sums/")
        assert answer.label.verdict == ("correct" if answer.model == MODELS[0] else "wrong")
        if answer.label.error is not None:
            said, right = answer.response.rpartition("#### ")[2], rights[answer.messages[-1]["content"]]
            shared = next(place for place, digit in enumerate(said) if digit != right[place : place + 1])
            assert answer.response[answer.label.error[0] :] == said[shared:]
            assert answer.label.error[1] == answer.label.error[0] + 1
    assert provenance.read(out)["config"]["models"] == list(MODELS)
    generate(prompts, MODELS, "embedded", out, store, entry=EntryOptions(licence="CC0-1.0", author="me"))
    assert len(script.asked) == 20
    with Store(store) as opened:
        assert sorted(answer.id for answer in opened.answers()) == sorted(answer.id for answer in answers)
        assert opened.num_entries() == 20


def test_pairs_keep_one_right_and_one_wrong_answer_of_a_question(
    prompts: Path, tmp_path: Path, script: Scripted, capsys: pytest.CaptureFixture[str]
) -> None:
    usual, alike = script.say, script.questions[:3]
    script.say = lambda model, question, settings: usual(MODELS[0] if question in alike else model, question, settings)
    generate(
        prompts,
        MODELS,
        "embedded",
        tmp_path / "out",
        entry=EntryOptions(licence="MIT"),
        pairs=True,
        answers=AnswerOptions(samples=2),
    )
    assert "pairs: 7; 3 questions lack a right or a wrong answer" in capsys.readouterr().out
    by_question: dict[str, list[str]] = {}
    for answer in read_answers(tmp_path / "out" / "answers.jsonl"):
        assert answer.label is not None
        by_question.setdefault(answer.question(), []).append(answer.label.verdict)
    assert [sorted(verdicts) for verdicts in by_question.values()] == [["correct", "wrong"]] * 7


def test_a_killed_run_goes_on_and_neither_asks_nor_checks_twice(
    prompts: Path, tmp_path: Path, script: Scripted
) -> None:
    log, code = tmp_path / "log", tmp_path / "mine.py"
    code.write_text(
        "from draftsmith.label.checkers.checkers import Checked\n"
        f"def f(row, response):\n    open({str(log)!r}, 'a').write(row['id'] + '\\n')\n"
        f"    if open({str(log)!r}).read().count('\\n') == 15: raise KeyboardInterrupt\n"
        "    return Checked('correct' if str(row['answer']) in response.split('####')[1] else 'unplaced')\n"
    )
    arguments: dict[str, Any] = {
        "prompts": prompts,
        "models": MODELS,
        "checker": f"{code}:f",
        "entry": EntryOptions(licence="MIT"),
    }
    script.lives = 3
    for _ in range(2):  # once at work on replies, once at work on checks
        with pytest.raises(KeyboardInterrupt):
            generate(**arguments, out=tmp_path / "cut", batches=BatchOptions(batch_rows=4, batch_tokens=32768))
        script.lives = 1000
    generate(**arguments, out=tmp_path / "cut", batches=BatchOptions(batch_rows=4, batch_tokens=32768))
    assert len(script.asked) == len(set(script.asked)) == 20
    assert len(log.read_text().split()) == 21  # the one that was cut short was checked again
    log.write_text("\n" * 20)
    generate(**arguments, out=tmp_path / "whole", batches=BatchOptions(batch_rows=4, batch_tokens=32768))
    cut, whole = (tmp_path / name / "answers.jsonl" for name in ("cut", "whole"))
    assert cut.read_text() == whole.read_text()


def test_samples_are_drawn_apart_and_the_same_answer_counts_once(
    prompts: Path, tmp_path: Path, script: Scripted, capsys: pytest.CaptureFixture[str]
) -> None:
    generate(
        prompts,
        MODELS,
        "embedded",
        tmp_path / "out",
        entry=EntryOptions(licence="MIT"),
        answers=AnswerOptions(samples=3),
        sampling=SamplingOverrides(temperature=0.7),
        selection=PromptSelection(limit=5),
    )
    assert "embedded:target: 5 correct; left out: 15 repeated" in capsys.readouterr().out
    assert [settings.temperature for settings in script.settings] == [0.0, 0.7, 0.7, 0.7] * 2
    drawn = [settings.seed for settings in script.settings if settings.temperature]
    assert len(set(drawn)) == 6


def test_a_reply_that_did_not_end_is_left_out(
    prompts: Path, tmp_path: Path, script: Scripted, capsys: pytest.CaptureFixture[str]
) -> None:
    usual, cut = script.say, script.questions[0]
    script.say = lambda model, question, settings: "" if question == cut else usual(model, question, settings)
    generate(prompts, MODELS[:1], "final-number", tmp_path / "out", entry=EntryOptions(licence="MIT"))
    assert "embedded:target: 9 correct; left out: 1 unfinished" in capsys.readouterr().out


def test_another_checker_judges_the_same_replies_under_its_own_name(
    prompts: Path, tmp_path: Path, script: Scripted
) -> None:
    store = str(tmp_path / "labels.db")
    for checker in ("embedded", "final-number"):
        generate(prompts, MODELS, checker, tmp_path / "out", store, entry=EntryOptions(licence="MIT", author="me"))
    assert len(script.asked) == 20
    with Store(store) as opened:
        labels = [answer.label for answer in opened.answers() if answer.model == MODELS[1]]
        assert {(label.labelled_by, label.verdict) for label in labels if label} == {
            ("embedded", "wrong"),
            ("final-number", "unplaced"),
        }


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"entry": EntryOptions()}, r"prompts.jsonl:1: the licence is not in the row"),
        ({}, {"checker": "nothing"}, "checker 'nothing' is not known"),
        ({}, {"models": (MODELS[0], MODELS[0])}, "each once"),
        ({}, {"where": TargetOptions(revision="main")}, "belongs to one model"),
        (
            {},
            {"answers": AnswerOptions(samples=1), "sampling": SamplingOverrides(temperature=0.0)},
            "temperature is 0.0",
        ),
        ({}, {"checker": "CODE:beyond"}, r"prompts.jsonl:1 \(question .*, answer of embedded:target\): error is"),
        ({}, {"checker": "CODE:fails"}, r"prompts.jsonl:1 .* failed with ZeroDivisionError"),
    ],
)
def test_a_mistake_is_told_with_its_place_and_leaves_no_answers(
    prompts: Path, tmp_path: Path, script: Scripted, change: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    rows[2] |= change
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = tmp_path / "code.py"
    code.write_text(
        "from draftsmith.label.checkers.checkers import Checked\n"
        "def beyond(row, response): return Checked('wrong', (0, 10**6))\n"
        "def fails(row, response): return 1 / 0\n"
    )
    arguments: dict[str, Any] = {
        "models": MODELS,
        "checker": "embedded",
        "entry": EntryOptions(licence="MIT"),
    } | options
    arguments["checker"] = arguments["checker"].replace("CODE", str(code))
    with pytest.raises(ValueError, match=message):
        generate(prompts, out=tmp_path / "out", **arguments)
    assert not (tmp_path / "out" / "answers.jsonl").exists()
    assert script.asked == [] or "CODE" in options["checker"]


def test_no_answer_and_no_question_are_mistakes() -> None:
    with pytest.raises(ValueError, match="at least one answer"):
        AnswerOptions(greedy=False)
    with pytest.raises(ValueError, match="limit is -1; it must be at least 1"):
        PromptSelection(limit=-1)


def test_questions_that_cannot_be_asked_or_judged_are_left_out_with_their_place(
    prompts: Path, tmp_path: Path, script: Scripted, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    rows[2] |= {"answer": "none"}
    rows[3] |= {"text": "A book.", "messages": []}
    rows[4] |= {"licence": 7}
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    generate(prompts, MODELS[:1], "final-number", tmp_path / "out", entry=EntryOptions(licence="MIT"))
    assert len(script.asked) == len(rows) - 3
    told = capsys.readouterr().err
    for reason in (":3: the row: its reference", ":4: ", "is a document", ":5: the licence is 7, not text"):
        assert reason in told


def test_a_checker_gets_a_row_as_every_command_reads_it(prompts: Path, tmp_path: Path, script: Scripted) -> None:
    row = json.loads(prompts.read_text().splitlines()[0])
    [turn] = row["messages"]
    parts = [{"type": "text", "text": turn["content"]}]
    changed = row | {"messages": [turn | {"content": parts}], "reference": "It is 7."}
    del changed["answer"]
    prompts.write_text(json.dumps(changed) + "\n")
    for checker in ("embedded", "final-number"):
        generate(prompts, MODELS[:1], checker, tmp_path / checker, entry=EntryOptions(licence="MIT"))


def test_a_user_without_a_name_is_told_before_anything_is_asked(
    prompts: Path, tmp_path: Path, script: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nameless() -> str:
        raise OSError("No username set in the environment")

    monkeypatch.setattr(getpass, "getuser", nameless)
    asked: dict[str, Any] = {"models": MODELS, "checker": "embedded", "entry": EntryOptions(licence="MIT")}
    asked["selection"] = PromptSelection(limit=1)
    with pytest.raises(ValueError, match="say who adds to the store with --author"):
        generate(prompts, out=tmp_path / "out", store=str(tmp_path / "labels.db"), **asked)
    assert script.asked == []
    generate(prompts, out=tmp_path / "out", **asked)
    assert (tmp_path / "out" / "answers.jsonl").exists(), "without a store nobody's name is needed"


def test_the_command_works_with_the_embedded_models(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["label", "generate", "--prompts", prompts, "--models", *MODELS, "--checker", "embedded", "--limit", "3"]
    assert cli.main([str(word) for word in [*words, "--out", tmp_path / "out", "--licence", "Apache-2.0"]]) == 0
    assert "answers to 3 questions" in capsys.readouterr().out
    answers = list(read_answers(tmp_path / "out" / "answers.jsonl"))
    assert {answer.model for answer in answers} <= set(MODELS)
    assert len(answers) >= 3

"""The command `draftsmith label mine` on the embedded models: labels, files, counts, and resuming after a kill."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_tokenizer, save_target

from draftsmith import cli, embedded
from draftsmith.data.chat_template import ChatTemplate
from draftsmith.label.answer_rows import read_answers
from draftsmith.label.checkers.checkers import load_checker
from draftsmith.label.mine import mine_command as command
from draftsmith.label.mine.answers import answer_parser
from draftsmith.label.mine.many_questions import Miner
from draftsmith.label.mine.plain import mine_plain
from draftsmith.label.mine.question_mining import MiningQuestion, MiningResult, Rules
from draftsmith.label.mine.questions import QuestionRow, read_questions
from draftsmith.label.token_labels import IGNORED
from draftsmith.label.token_rows import LabelledRow, read_rows
from draftsmith.models.files.loading import load_tokenizer
from draftsmith.models.target.target import Target

TARGET, DRAFT = "embedded:target", "embedded:draft_lm"
NUM_PROMPTS = 4


@pytest.fixture(scope="module")
def models() -> tuple[Target, Target]:
    return Target.load(TARGET), Target.load(DRAFT)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Problems of which the draft's tokens make some fail."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    embedded.write_prompts(path, "test", 20)
    lines = path.read_text().splitlines()[13 : 13 + NUM_PROMPTS]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def run(prompts: Path, out: Path, *words: object) -> int:
    asked = ["--target", TARGET, "--draft", DRAFT, "--prompts", prompts, "--out", out, "--max-new-tokens", 120, *words]
    return cli.main(["label", "mine", *map(str, asked)])


@pytest.fixture(scope="module")
def mined(prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mined") / "out"
    assert run(prompts, out, "--batch-rows", 3) == 0
    return out


def asked_and_rules(prompts: Path) -> tuple[list[QuestionRow], Rules]:
    tokenizer, parse = load_tokenizer(TARGET), answer_parser("final-number")
    asked = read_questions(prompts, ChatTemplate(tokenizer, None, (3,)), parse, 768)
    return asked, Rules(
        lambda reply: parse(str(tokenizer.decode(reply, skip_special_tokens=True))), (3,), 120, context=512
    )


def test_rows_hold_the_labels_of_the_plain_procedure(prompts: Path, mined: Path, models: tuple[Target, Target]) -> None:
    expected: list[LabelledRow] = []
    for asked, plain in plainly(prompts, models):
        common = {"question": asked.key, "source": asked.source, "how": "mined", "prompt_ids": plain.prompt_ids}
        labels = [IGNORED] * len(plain.reply_ids)
        for swap in plain.swaps:
            if swap.label:
                labels[swap.place] = 1
        if any(swap.label for swap in plain.swaps):
            expected.append(LabelledRow(f"{plain.id}/accepted", reply_ids=plain.reply_ids, labels=labels, **common))  # type: ignore[arg-type]
        for swap in plain.swaps:
            if not swap.label:
                reply = [*plain.reply_ids[: swap.place], swap.draft_token]
                labels = [*[IGNORED] * swap.place, 0]
                expected.append(
                    LabelledRow(f"{plain.id}/rejected-{swap.place}", reply_ids=reply, labels=labels, **common)
                )  # type: ignore[arg-type]
    assert list(read_rows(mined / "rows.jsonl")) == expected
    assert {label for row in expected for label in row.labels} == {0, 1, IGNORED}


def plainly(prompts: Path, models: tuple[Target, Target]) -> Iterator[tuple[QuestionRow, MiningResult]]:
    found, rules = asked_and_rules(prompts)
    for asked in found:
        yield asked, mine_plain(*models, asked.question, rules)


def test_answers_label_the_drafts_characters_and_nothing_else(mined: Path) -> None:
    rows, answers = list(read_rows(mined / "rows.jsonl")), list(read_answers(mined / "answers.jsonl"))
    num_labels = sum(label != IGNORED for row in rows for label in row.labels)
    assert len(answers) == len({answer.id for answer in answers}) == num_labels
    for answer in answers:
        assert answer.label is not None
        assert answer.label.checked is not None
        assert answer.label.checked[1] == len(answer.response)
        assert answer.label.error == (answer.label.checked if answer.label.verdict == "wrong" else None)
        assert (answer.label.how, answer.label.labelled_by) == ("mined", "draftsmith mine")
    assert {answer.question() for answer in answers} == {row.question for row in rows}
    report = json.loads((mined / "report.json").read_text())
    wrong = sum(answer.label is not None and answer.label.verdict == "wrong" for answer in answers)
    assert report["labels"] == {"correct": num_labels - wrong, "wrong": wrong}
    assert (report["answers"], report["swaps_without_answer"]) == (num_labels, 0)


@pytest.mark.parametrize("batch_rows", [1, 4])
def test_the_batch_changes_no_file_of_labels(prompts: Path, mined: Path, tmp_path: Path, batch_rows: int) -> None:
    assert run(prompts, tmp_path / "out", "--batch-rows", batch_rows, "--draft-length", 2) == 0
    for name in ("rows.jsonl", "answers.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (mined / name).read_bytes()


def test_a_killed_run_goes_on_and_every_question_is_there_once(
    prompts: Path, mined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = Miner.mine, tmp_path / "out"

    def killed(miner: Miner, questions: Sequence[MiningQuestion]) -> Iterator[MiningResult]:
        for number, one in enumerate(whole(miner, questions)):
            if number == 2:
                raise KeyboardInterrupt
            yield one

    monkeypatch.setattr(Miner, "mine", killed)
    assert run(prompts, out) == 130
    assert not (out / "rows.jsonl").exists()
    with open(out / "mined.jsonl", "a") as log:
        log.write('{"id": "torn')
    asked: list[int] = []
    monkeypatch.setattr(Miner, "mine", lambda miner, found: asked.append(len(found)) or whole(miner, found))
    assert run(prompts, out) == 0
    assert asked == [NUM_PROMPTS - 2]
    log_rows = [json.loads(line) for line in (out / "mined.jsonl").read_text().splitlines()]
    assert len({row["id"] for row in log_rows}) == len(log_rows) == NUM_PROMPTS
    for name in ("rows.jsonl", "answers.jsonl"):
        assert (out / name).read_bytes() == (mined / name).read_bytes()


def test_the_forwards_and_tokens_of_the_report_are_those_of_the_models(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[torch.Tensor]] = {}
    load = Target.load.__func__  # type: ignore[attr-defined]

    def watched(kind: type[Target], path: str, *rest: Any) -> Target:
        target: Target = load(kind, path, *rest)
        calls = seen.setdefault(path, [])
        target.model.model.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append(kwargs["input_ids"]), with_kwargs=True
        )
        return target

    monkeypatch.setattr(Target, "load", classmethod(watched))
    assert run(prompts, tmp_path / "out", "--batch-rows", 2) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    for name, path in (("target", TARGET), ("draft", DRAFT)):
        assert report[name]["forwards"] == len(seen[path])
        assert report[name]["tokens"] + report[name]["padding"] == sum(ids.numel() for ids in seen[path])
    tokens = report["tokens"]
    assert report["target"]["tokens"] == tokens["prompt"] + tokens["answer"] + tokens["alternative"]
    assert report["draft"]["tokens"] == tokens["draft"] + tokens["guess"]
    assert report["row_forwards"]["prompt"] == NUM_PROMPTS
    num_labels = sum(report["labels"].values())
    assert report["target_forwards_per_label"] == len(seen[TARGET]) / num_labels


def test_a_known_continuation_saves_most_forwards(prompts: Path, models: tuple[Target, Target]) -> None:
    found, rules = asked_and_rules(prompts)
    questions = [asked.question for asked in found]
    spent = []
    for window, length in ((0, 0), (16, 0), (16, 5)):
        miner = Miner(*models, Rules(**(vars(rules) | {"draft_window": window, "draft_length": length})), 1)
        assert len(list(miner.mine(questions))) == NUM_PROMPTS
        spent.append(miner.forwards()[0].forwards)
    assert spent[1] < 0.6 * spent[0]
    assert spent[2] < 0.6 * spent[1]


def test_questions_come_as_messages_or_ids_with_a_given_reply_and_a_reference(tmp_path: Path, mined: Path) -> None:
    first = next(read_rows(mined / "rows.jsonl"))
    log = json.loads((mined / "mined.jsonl").read_text().splitlines()[0])
    rows = [
        {"prompt_ids": log["prompt_ids"], "reply_ids": log["first_reply_ids"], "reference": [f"So {log['answer']}"]},
        {"id": "other", "prompt_ids": log["prompt_ids"], "answer": 987654},
        {"id": "silent", "prompt_ids": log["prompt_ids"]},
    ]
    path, out = tmp_path / "ids.jsonl", tmp_path / "out"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(path, out, "--against", "reference") == 0
    report = json.loads((out / "report.json").read_text())
    assert report["left_out"] == {"the target's answer is not the reference's": 2}
    assert sum(report["labels"].values()) == len(log["swaps"]) == report["swaps_without_answer"]
    assert (out / "answers.jsonl").read_text() == ""
    ours = list(read_rows(out / "rows.jsonl"))
    assert {row.question for row in ours} != {first.question}
    assert ours[0].reply_ids == log["reply_ids"]


def test_a_checker_judges_each_alternative_by_its_questions_row(
    prompts: Path, tmp_path: Path, models: tuple[Target, Target]
) -> None:
    out = tmp_path / "out"
    assert run(prompts, out, "--checker", "embedded", "--against", "reference") == 0
    report = json.loads((out / "report.json").read_text())
    assert report["labels"]["correct"] > 0
    assert report["labels"]["wrong"] > 0
    tokenizer, rows = load_tokenizer(TARGET), [json.loads(line) for line in prompts.read_text().splitlines()]
    found, rules = asked_and_rules(prompts)
    check = load_checker("embedded").check
    log = {row["id"]: row for row in map(json.loads, (out / "mined.jsonl").read_text().splitlines())}
    for asked, row in zip(found, rows, strict=True):
        parse = partial(
            lambda row, reply: check(row, str(tokenizer.decode(reply, skip_special_tokens=True))).verdict, row
        )
        question = replace(asked.question, parse=parse, reference="correct")
        plain = mine_plain(*models, question, replace(rules, against="reference"))
        assert log[plain.id]["swaps"] == [vars(swap) for swap in plain.swaps]
        assert plain.left_out or parse(log[plain.id]["reply_ids"]) == "correct", "the last reply is right throughout"


def test_a_function_of_the_user_judges_and_its_code_is_a_part_of_the_run(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = tmp_path / "code.py", tmp_path / "out"
    code.write_text(
        "from draftsmith.label.checkers.checkers import Checked\n"
        "def never(row, response): return Checked('unplaced')\n"
        "def always(row, response): return Checked('correct')\n"
        "def fails(row, response): return row['nothing']\n"
    )
    words = ("--against", "reference", "--limit", 1, "--checker")
    assert run(prompts, tmp_path / "never", *words, f"{code}:never") == 0
    report = json.loads((tmp_path / "never" / "report.json").read_text())
    assert report["left_out"] == {"the target's answer is not the reference's": 1}
    assert run(prompts, out, *words, f"{code}:always") == 0
    labels = json.loads((out / "report.json").read_text())["labels"]
    assert labels["correct"] > 0
    assert labels["wrong"] == 0
    code.write_text(code.read_text() + "# changed\n")
    assert run(prompts, out, *words, f"{code}:always") == 1
    assert "holds labels of another run (checker: there" in capsys.readouterr().err
    assert run(prompts, tmp_path / "fails", *words, f"{code}:fails") == 1
    assert f"{prompts}:1: the checker {code}:fails failed with KeyError" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "told"), [
    (("--checker", "nothing"), "checker 'nothing' is not known; use one of final-number"),
    (("--checker", "embedded"), "add --against reference"),
    (("--checker", "unit-tests", "--against", "reference"), "prompts.jsonl:1: the row has no tests"),
])  # fmt: skip
def test_a_checker_that_cannot_judge_is_refused(
    words: tuple[str, ...], told: str, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(prompts, tmp_path / "out", *words) == 1
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out" / "mined.jsonl").exists()


ROW = {"prompt_ids": [5, 6]}


@pytest.mark.parametrize(("rows", "told"), [
    ([{}], "the row has neither messages nor prompt_ids"),
    ([{**ROW, "messages": [{"role": "user", "content": "How many?"}]}], "the row has messages and prompt_ids"),
    ([{"messages": [{"role": "user", "content": " "}]}], "an empty turn (turn 0, the user's)"),
    ([{"messages": [{"role": "user", "content": "a"}] * 2}], "turn 1 is the user's where the assistant's belongs"),
    ([{"messages": [{"role": r, "content": "a"} for r in ("user", "assistant")]}], "they are one question"),
    ([{"messages": [{"role": "user", "content": "a", "images": ["x"]}]}], "turn 0 has images, which are not read"),
    ([{**ROW, "licence": ["MIT"]}], 'licence is ["MIT"]; it is text'),
    ([{**ROW, "source": 7}], "source is 7; it is text"),
    ([{"prompt_ids": [5, 768]}], "prompt_ids is [5, 768]; it is a list of token ids below 768"),
    ([{"prompt_ids": []}], "prompt_ids is []"),
    ([{**ROW, "reply_ids": []}], "reply_ids is []"),
    ([{**ROW, "id": True}], "id is True, which is neither text nor a whole number"),
    ([{**ROW, "answer": {"a": 1}}], "it is a text or a number"),
    ([{"prompt_ids": [5] * 512}], "the target's context holds 512"),
])  # fmt: skip
def test_a_bad_row_is_refused_with_its_place(
    rows: list[dict[str, Any]], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(path, tmp_path / "out") == 1
    assert told in capsys.readouterr().err


def test_a_repeated_id_is_left_out_with_its_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "two.jsonl"
    path.write_text("".join(json.dumps({**ROW, "id": "a"}) + "\n" for _ in range(2)))
    chat = ChatTemplate(make_tokenizer(), None, (3,))
    assert len(read_questions(path, chat, answer_parser("final-number"), 768)) == 1
    assert f'two.jsonl:2: id is "a"; {path}:1 has it already' in capsys.readouterr().err


def test_a_target_that_asks_for_other_than_its_likeliest_tokens_is_refused_by_the_field(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = save_target(tmp_path / "target", seed=0)
    config = {"eos_token_id": 4, "repetition_penalty": 1.05, "min_new_tokens": 2, "do_sample": True, "top_k": 20}
    (target / "generation_config.json").write_text(json.dumps(config))
    assert run(prompts, tmp_path / "out", "--target", target, "--draft", target) == 1
    assert "sets min_new_tokens, repetition_penalty, which mining does not honour" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_row_that_does_not_fit_the_run_is_left_out_with_its_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (ROW, {"prompt_ids": [7]})))

    def fit(asked: QuestionRow) -> QuestionRow:
        if asked.question.prompt_ids == [7]:
            raise ValueError("seven is too few")
        return asked

    tokenizer = load_tokenizer("embedded:target")
    [asked] = read_questions(path, ChatTemplate(tokenizer), lambda text: text, 768, fit=fit)
    assert asked.place == f"{path}:1"
    assert f"{path}:2: seven is too few" in capsys.readouterr().err


def test_settings_out_of_range_and_another_runs_folder_are_refused(
    prompts: Path, mined: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(prompts, mined, "--max-length", "2") == 1
    assert "holds labels of another run (max_length: there None, now 2" in capsys.readouterr().err
    for words, told in ((("--limit", 0), "limit is 0"), (("--batch-rows", 0), "batch_rows is 0"),
                        (("--stop-on-rejoin", 2), "stop_on_rejoin is 2; it must be at least 3")):  # fmt: skip
        assert run(prompts, mined, *words) == 1
        assert told in capsys.readouterr().err


def test_an_id_that_stands_for_another_prompt_than_before_is_refused(
    prompts: Path, mined: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = json.loads(prompts.read_text().splitlines()[0])
    row["messages"] = [{"role": "user", "content": "How many?"}]
    (tmp_path / "other.jsonl").write_text(json.dumps(row) + "\n")
    assert run(tmp_path / "other.jsonl", mined) == 1
    assert "with another prompt" in capsys.readouterr().err


def test_a_draft_with_another_tokenizer_is_refused_with_the_first_difference() -> None:
    ours, other = load_tokenizer(TARGET), make_tokenizer()
    command.check_tokenizers(ours, load_tokenizer(DRAFT), "t", "d")
    with pytest.raises(ValueError, match="the draft d has another tokenizer than the target t: token 1 is ") as told:
        command.check_tokenizers(ours, other, "t", "d")
    assert "'<|user|>' in the target's and '<|system|>' in the draft's" in str(told.value)

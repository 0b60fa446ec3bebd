"""Errors put into right answers: what is swapped, where the error is, and the command from answers or problems to labelled answers."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from draftsmith.cli import main
from draftsmith.embedded import distinct_problems, write_prompts
from draftsmith.label.answer_rows import read_answers
from draftsmith.label.checkers.sums_answers import judge, problem_of
from draftsmith.label.corrupt.corpora import Corrupted, corrupt_sum, load_corruptor, wrong_answers
from draftsmith.label.corrupt.text_swaps import Swap, SwapKind, swaps

PROMPT = "Last week Tom met Mia. They have 12 pens. How many?"
TEXT = "1. Tom has 12 * 5 = 60 pens.\nStep 2: 60 + 3.5 is 63.5, so Mia has 63.5."
KINDS: list[SwapKind] = ["numbers", "operators", "names"]


def swapped(kind: SwapKind, text: str = TEXT) -> list[tuple[str, str]]:
    """Old and new pieces of a kind."""
    return [(text[slice(*swap.span)], swap.new) for swap in swaps(text, PROMPT, [kind], random.Random(1))]


def test_numbers_become_others_of_the_same_length_and_counts_of_lines_stay() -> None:
    found = swapped("numbers")
    assert [old for old, _ in found] == ["12", "5", "60", "60", "3.5", "63.5", "63.5"]
    for old, new in found:
        assert len(old) == len(new)
        assert sum(one != other for one, other in zip(old, new, strict=True)) == 1
        assert new[0] != "0"


def test_operators_become_others_and_signs_of_numbers_and_hyphens_stay() -> None:
    assert swapped("operators") == [("*", "+"), ("+", "-")]
    assert swapped("operators", "x is -3, a well-known number; 4*5 / (2 + y) = 1") == [
        ("*", "+"),
        ("/", "*"),
        ("+", "-"),
    ]


def test_names_come_from_the_prompt_and_beginnings_of_sentences_are_none() -> None:
    assert swapped("names") == [("Tom", "Mia"), ("Mia", "Tom")]
    assert swapped("names", "Last of all They went.") == []


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [("53", "56", "6"), ("53", "73", "73"), ("Tom", "Tim", "im"), ("Tom", "Tommy", "my"), ("Tommy", "Tom", "Tom")],
)
def test_an_error_begins_at_the_first_character_that_differs(old: str, new: str, error: str) -> None:
    text, span = Swap("names", (3, 3 + len(old)), new).applied(f"So {old} is it.")
    assert text == f"So {new} is it."
    assert text[slice(*span)] == error


@pytest.mark.parametrize("wording", ["draft", "target", "mixed"])
def test_a_sum_is_wrong_where_the_checker_says_and_in_the_wording_that_was_asked_for(wording: str) -> None:
    phrases = {"draft": "To start, ", "target": "First, "}
    for number, problem in enumerate(distinct_problems("train", 20, 5)):
        wrong = corrupt_sum(
            {"messages": [{"role": "user", "content": problem.question}]}, wording, random.Random(number)
        )  # type: ignore[arg-type]
        assert wrong is not None
        asked = problem_of(problem.question)
        assert asked is not None
        assert judge(asked, wrong.response).error_span == wrong.error
        assert problem.steps[0].label in wrong.response
        assert wrong.response.startswith(phrases.get(wording, ("To start, ", "First, ")))  # type: ignore[arg-type]


def test_mixed_wordings_have_lines_of_both() -> None:
    rows = [
        {"messages": [{"role": "user", "content": problem.question}]} for problem in distinct_problems("train", 12, 1)
    ]
    texts = [corrupt_sum(row, "mixed", random.Random(1)) for row in rows]
    both = [
        text
        for text in texts
        if text and any(w in text.response for w in ("Then ", "First, ")) and "Next, " in text.response
    ]
    assert both


def test_a_corruptor_that_places_an_error_outside_is_an_error() -> None:
    with pytest.raises(ValueError, match="the error inside the response"):
        list(wrong_answers({}, ["draft"], lambda row, wording, rng: Corrupted("abc", (2, 5)), "0"))
    with pytest.raises(ValueError, match="corruptor 'sums' is not known"):
        load_corruptor("sums")


def run(*words: object) -> int:
    return main(["label", "corrupt", *map(str, words)])


def test_problems_give_a_wrong_answer_in_every_wording_and_the_same_ones_again(tmp_path: Path) -> None:
    write_prompts(tmp_path / "train.jsonl", "train", 4)
    words = ["--source", tmp_path / "train.jsonl", "--corruptor", "embedded", "--licence", "Apache-2.0"]
    for name in ("a", "b"):
        assert run(*words, "--out", tmp_path / name) == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    answers = list(read_answers(tmp_path / "a"))
    assert len(answers) == 12
    assert len({answer.question() for answer in answers}) == 4
    assert {answer.label.note for answer in answers if answer.label} == {
        "draft wording",
        "target wording",
        "mixed wording",
    }
    assert run(*words, "--seed", 1, "--out", tmp_path / "c") == 0
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def test_right_answers_are_spoiled_and_others_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def row(response: str, verdict: str | None, **more: object) -> dict[str, object]:
        label = {} if verdict is None else {"labelled_by": "me", "how": "person"}
        messages = [{"role": "user", "content": PROMPT}]
        return (
            {
                "messages": messages,
                "response": response,
                "model": "m",
                "licence": "MIT",
                "source": "s",
                "verdict": verdict,
            }
            | label
            | more
        )

    rows = [
        row(TEXT, "correct"),
        row("Nothing to swap.", "correct"),
        row("It is 13.", "wrong", error=[6, 8]),
        row("It is 12.", None),
        row("It is 12 and 4.", "correct", checked=[0, 8]),
    ]
    source = tmp_path / "answers.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("--source", source, "--per_answer", 3, "--out", tmp_path / "wrong.jsonl") == 0
    answers = list(read_answers(tmp_path / "wrong.jsonl"))
    assert len(answers) == len({answer.id for answer in answers}) == 4
    for answer in answers:
        label = answer.label
        assert label is not None
        assert (label.verdict, label.how) == ("wrong", "rule")
        assert label.error is not None
        assert answer.model == "m"
    part = answers[-1]
    assert part.response.endswith(" and 4.")  # nobody has checked that far
    said = capsys.readouterr()
    assert "4 wrong answers in" in said.out
    assert "nobody has found it free of errors" in said.err
    assert "nothing to swap" in said.err


def test_an_answer_that_somebody_found_wrong_is_not_spoiled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = {
        "messages": [{"role": "user", "content": PROMPT}],
        "response": "It is 12.",
        "model": "m",
        "licence": "MIT",
    }
    fields |= {"source": "s", "how": "person"}
    labels: list[dict[str, object]] = [
        {"labelled_by": "me", "verdict": "correct"},
        {"labelled_by": "you", "verdict": "wrong", "error": [6, 8]},
    ]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(fields | label) + "\n" for label in labels))
    assert run("--source", tmp_path / "answers.jsonl", "--out", tmp_path / "wrong.jsonl") == 1
    assert "nobody has found it free of errors" in capsys.readouterr().err


def test_a_problem_without_messages_is_left_out_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.py").write_text(
        "from draftsmith.label.corrupt.corpora import Corrupted\n\ndef spoil(row, wording, rng):\n    return Corrupted('no', (0, 2))\n"
    )
    source = tmp_path / "problems.jsonl"
    source.write_text(json.dumps({"problem": "How many?"}) + "\n")
    words = ["--corruptor", f"{tmp_path / 'own.py'}:spoil", "--licence", "MIT", "--out", tmp_path / "out"]
    assert run("--source", source, *words) == 1
    assert "the row has no messages" in capsys.readouterr().err


def test_digits_of_other_scripts_stay() -> None:
    assert swapped("numbers", "It is \uff15 or \u0663.") == []


def test_what_cannot_be_spoiled_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_prompts(tmp_path / "train.jsonl", "train", 2)
    words = ["--source", tmp_path / "train.jsonl", "--corruptor", "embedded", "--out", tmp_path / "out"]
    assert run(*words) == 1
    assert "give it with --licence" in capsys.readouterr().err
    assert run(*words, "--licence", "MIT", "--wordings", "[]") != 0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("corruptor", ["text", "embedded"])
def test_a_line_that_cannot_be_spoiled_is_said_and_costs_no_other(
    tmp_path: Path, corruptor: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if corruptor == "text":
        row = {"messages": [{"role": "user", "content": PROMPT}], "response": TEXT, "model": "m", "licence": "MIT"}
        good = row | {"source": "s", "verdict": "correct", "labelled_by": "a", "how": "rule"}
        bad = [json.dumps(good | {"verdict": "fine"})]
    else:
        write_prompts(tmp_path / "sums.jsonl", "train", 2)
        good = json.loads((tmp_path / "sums.jsonl").read_text().splitlines()[0])
        bad = [json.dumps(good | {"messages": [turn]}) for turn in ({"role": "user"}, "q", None)]
    lines = ["{not JSON", *bad, json.dumps(good)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    options = [f"--source={tmp_path / 'in.jsonl'}", f"--out={tmp_path / 'out.jsonl'}", f"--corruptor={corruptor}"]
    assert main(["label", "corrupt", *options, "--licence=MIT"]) in (None, 0)
    assert list(read_answers(tmp_path / "out.jsonl"))
    said = capsys.readouterr().err
    assert f"{len(lines) - 1} rows dropped" in said
    assert f"{tmp_path / 'in.jsonl'}:1: not valid JSON" in said

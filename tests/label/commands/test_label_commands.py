import json
from pathlib import Path

import pytest

from draftsmith import cli
from draftsmith.label.answer_rows import read_answers
from draftsmith.label.store.store import Store

ROWS = [
    {"input": "Sort.", "steps": ["ab", "cde", "f"], "mistake_index": 1},
    {"input": "Sort.", "steps": ["ab"], "mistake_index": None},
    {"input": "Count.", "steps": ["1", "2"], "mistake_index": None},
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "steps.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def run(*words: object) -> int:
    return cli.main(["label", *map(str, words)])


def test_import_stats_and_export_go_together(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, out = tmp_path / "runs" / "labels.db", tmp_path / "out.jsonl"
    assert run("import", "--source", source, "--store", place, "--licence", "MIT", "--author", "me") == 0
    told = capsys.readouterr().out
    assert "(mistake): 3 new answers and 3 new labels" in told
    assert "labels: 2 correct, 1 wrong" in told
    assert run("import", "--source", source, "--store", place, "--licence", "MIT") == 0
    assert "0 new answers and 0 new labels" in capsys.readouterr().out
    assert run("stats", "--store", place) == 0
    told = capsys.readouterr().out
    assert "3 answers to 2 questions, 3 entries in the log: 2 correct, 1 wrong" in told
    assert "source steps (MIT): 2 correct, 1 wrong" in told
    assert "labelled by steps (person): 2 correct, 1 wrong" in told
    assert run("export", "--store", place, "--out", out) == 0
    assert len(list(read_answers(out))) == 3
    with Store(str(place)) as store:
        assert {entry.author for answer in store.answers() for entry in store.history(answer.id)} == {"me"}


def test_an_export_imports_into_another_store_as_it_was(source: Path, tmp_path: Path) -> None:
    first, second, out = tmp_path / "a.db", tmp_path / "b.db", tmp_path / "out"
    assert run("import", "--source", source, "--store", first, "--licence", "MIT") == 0
    for name in ("answers", "label-studio"):
        path = out.with_suffix(".jsonl" if name == "answers" else ".json")
        assert run("export", "--store", first, "--out", path, "--format", name) == 0
        assert run("import", "--source", path, "--store", second) == 0
    with Store(str(first)) as one, Store(str(second)) as other:
        assert one.answers() == other.answers()
        assert other.num_entries() == 3


def test_with_a_target_lines_hold_its_tokens_and_stats_count_them(
    source: Path, tmp_path: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, out = tmp_path / "labels.db", tmp_path / "out.jsonl"
    assert run("import", "--source", source, "--store", place, "--licence", "MIT") == 0
    assert run("export", "--store", place, "--out", out, "--target", target) == 0
    answers = list(read_answers(out))
    num_tokens = sum(len(answer.tokens.offsets) for answer in answers if answer.tokens)
    capsys.readouterr()
    for after in ("ignored", "wrong"):
        assert run("stats", "--store", place, "--target", target, "--after", after) == 0
    ignored, wrong = (line for line in capsys.readouterr().out.splitlines() if line.startswith("tokens of"))
    assert sum(int(word) for word in ignored.split() if word.isdigit()) == num_tokens
    assert not ignored.endswith(" 0 ignored")
    assert wrong.endswith(" 0 ignored")
    assert run("import", "--source", out, "--store", place) == 0
    with Store(str(place)) as store:
        assert [answer.tokens for answer in store.answers()] == [answer.tokens for answer in answers]


@pytest.mark.parametrize("as_url", [False, True])
def test_an_export_never_overwrites_its_own_store(
    source: Path, tmp_path: Path, as_url: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "labels.db"
    assert run("import", "--source", source, "--store", place, "--licence", "MIT") == 0
    assert run("export", "--store", f"sqlite:///{place}" if as_url else place, "--out", place) == 1
    assert "name another file" in capsys.readouterr().err
    with Store(str(place)) as store:
        assert store.num_entries() == 3


def test_rows_never_overwrite_what_they_are_made_of(
    source: Path, tmp_path: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, answers = tmp_path / "labels.db", tmp_path / "answers.jsonl"
    assert run("import", "--source", source, "--store", place, "--licence", "MIT") == 0
    assert run("export", "--store", place, "--out", answers) == 0
    before = answers.read_bytes(), place.read_bytes(), (target / "config.json").read_bytes()
    for given in (("--answers", answers, "--out", answers), ("--store", place, "--out", place)):
        assert run("rows", "--target", target, *given) == 1
    assert run("rows", "--target", target, "--answers", answers, "--out", target / "config.json") == 1
    assert capsys.readouterr().err.count("name another file") == 3
    assert (answers.read_bytes(), place.read_bytes(), (target / "config.json").read_bytes()) == before


def test_rows_that_are_left_out_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rated.jsonl"
    rows = [{"problem": "?", "steps": ["a"], "ratings": [rating]} for rating in (1, *[None] * 7)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("import", "--source", path, "--store", tmp_path / "labels.db", "--licence", "MIT") == 0
    told = capsys.readouterr().out
    assert "7 rows left out" in told
    assert f"left out: {path}:2: no step is rated" in told
    assert "left out: 2 more" in told


def test_a_bad_row_is_left_out_with_its_place_and_a_file_of_bad_rows_makes_no_store(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, bad = tmp_path / "labels.db", json.dumps(ROWS[0] | {"mistake_index": 9}) + "\n"
    good = source.read_text()
    source.write_text(bad + bad)
    assert run("import", "--source", source, "--store", place, "--licence", "MIT") == 1
    assert f"2 have mistakes; the first: {source}:1: mistake_index is 9" in capsys.readouterr().err
    assert not place.exists()
    source.write_text(good + bad)
    assert run("import", "--source", source, "--store", place, "--licence", "MIT") == 0
    assert f"left out: {source}:4: mistake_index is 9" in capsys.readouterr().out


@pytest.mark.parametrize("words", [("export", "--out", "out.jsonl"), ("stats",)])
def test_a_missing_store_is_one_message(
    words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*words, "--store", tmp_path / "none.db") == 1
    assert "none.db does not exist" in capsys.readouterr().err


def test_an_export_of_nothing_and_tokens_for_label_studio_are_refused(
    tmp_path: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Store(str(tmp_path / "labels.db"), create=True).close()
    words = ("export", "--store", tmp_path / "labels.db", "--out", tmp_path / "out")
    assert run(*words) == 1
    assert "has no labelled answer" in capsys.readouterr().err
    assert run(*words, "--format", "label-studio", "--target", target) == 1
    assert "no place for tokens" in capsys.readouterr().err
    assert run("import", "--source", tmp_path / "none.jsonl", "--store", tmp_path / "labels.db") == 1
    assert "none.jsonl is not a file" in capsys.readouterr().err


def test_import_says_how_it_counted_and_lists_every_row_that_it_leaves_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, listed = tmp_path / "set.jsonl", tmp_path / "left_out.txt"
    rows = [{"problem": f"q{label}", "steps": ["a", "b"], "label": label} for label in (1, 2, -1, *range(3, 12))]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--source", source, "--store", tmp_path / "a.db", "--licence", "MIT"]
    assert run("import", *options, "--left_out", listed, "--how", "rule") == 0
    told = capsys.readouterr().out
    assert "note: steps are counted from 1: the number equals that of the steps in 1 row" in told
    assert f"left out: 4 more; all are in {listed}" in told
    lines = listed.read_text().splitlines()
    assert len(lines) == 9
    assert all(line.startswith(f"{source}:{at}: label is ") for at, line in enumerate(lines, start=4))
    with Store(str(tmp_path / "a.db")) as store:
        labels = [answer.label for answer in store.answers()]
    assert [(label.how, label.error) for label in labels if label is not None] == [
        ("rule", (0, 1)),
        ("rule", (2, 3)),
        ("rule", None),
    ]
    assert run("import", *options, "--left_out", source) != 0
    assert json.loads(source.read_text().splitlines()[0]) == rows[0]
    assert run("import", *options[:3], tmp_path / "b.db", *options[4:], "--first_step", "zero") == 0
    with Store(str(tmp_path / "b.db")) as store:
        assert [answer.label.error for answer in store.answers() if answer.label is not None] == [(2, 3), None]


def test_a_file_that_contradicts_itself_adds_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, steps = tmp_path / "labels.db", {"model_output_steps": ["a", "b"]}
    listed = tmp_path / "left_out.txt"
    options = ["--store", place, "--licence", "MIT", "--left_out", listed]
    for name, others in (("good", (None, None, None)), ("bad", (None, 2, 2))):
        numbers = zip((None, 1, 1), others, strict=True)
        rows = [steps | {"question": f"{name}{at}", "first_error_step": number, "first_wrong_step": other}
                for at, (number, other) in enumerate(numbers)]  # fmt: skip
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("import", "--source", tmp_path / "good.jsonl", *options) == 0
    assert run("import", "--source", tmp_path / "bad.jsonl", *options) != 0
    assert "2 rows of" in (said := capsys.readouterr().err)
    assert "contradict themselves, more than the 0 that name a wrong step and do not" in said
    assert [line.split(": ")[0] for line in listed.read_text().splitlines()] == [
        f"{tmp_path / 'bad.jsonl'}:{at}" for at in (2, 3)
    ]
    with Store(str(place)) as store:
        assert len(store.answers()) == 3


def test_an_import_that_fails_before_the_last_row_lists_none(tmp_path: Path) -> None:
    source, listed, store = tmp_path / "in.jsonl", tmp_path / "left_out.txt", tmp_path / "labels.db"
    rows = [{"problem": "q", "steps": ["a"], "label": label} for label in (0, 7)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    store.write_text("no database")
    assert run("import", "--source", source, "--store", store, "--licence", "MIT", "--left_out", listed) != 0
    assert not listed.exists()


def test_a_file_of_skipped_rows_only_makes_no_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, place = tmp_path / "in.jsonl", tmp_path / "labels.db"
    path.write_text(json.dumps({"problem": "q", "steps": ["a"], "ratings": [None], "tail": ""}) + "\n")
    assert run("import", "--source", path, "--store", place, "--licence", "MIT") != 0
    assert "no row of" in (said := capsys.readouterr().err)
    assert "no step is rated" in said
    assert not place.exists()


def test_an_import_that_is_refused_behind_its_first_rows_leaves_no_store(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, place = tmp_path / "set.jsonl", tmp_path / "labels.db"
    steps = {"model_output_steps": ["a", "b"]}
    pairs = [(None, None), (1, 2), (2, 1)]
    rows = [steps | {"question": str(at), "first_error_step": number, "first_wrong_step": other}
            for at, (number, other) in enumerate(pairs)]  # fmt: skip
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for store in (place, f"sqlite:///{place}"):
        assert run("import", "--source", source, "--store", store, "--licence", "MIT") == 1
        assert "contradict themselves" in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == [source]
    assert run("stats", "--store", place) == 1
    assert "labels.db does not exist" in capsys.readouterr().err


def test_an_import_that_fails_leaves_a_store_that_was_there_as_it_was(source: Path, tmp_path: Path) -> None:
    place, twice = tmp_path / "labels.db", tmp_path / "twice.jsonl"
    assert run("import", "--source", source, "--store", place, "--licence", "MIT") == 0
    before = place.read_bytes()
    line = {"id": "a", "messages": [{"role": "user", "content": "q"}], "model": "m", "licence": "MIT", "source": "s"}
    line |= {"verdict": "correct", "labelled_by": "me", "how": "person"}
    twice.write_text("".join(json.dumps(line | {"response": text}) + "\n" for text in ("3", "4")))
    assert run("import", "--source", twice, "--store", place) == 1
    assert place.read_bytes() == before

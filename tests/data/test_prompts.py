import json
from collections.abc import Callable
from pathlib import Path

import pytest

from draftsmith.data.formats import detect_format, to_conversation
from draftsmith.data.prompts import prompts, read_prompts
from draftsmith.json_rows import UnusableRow

USER = {"role": "user", "content": "How many?"}
ROWS: dict[str, tuple[dict[str, object], list[str], list[str]]] = {
    "openai": (
        {"messages": [USER, {"role": "assistant", "content": "Two."}, {"role": "user", "content": "Sure?"}]},
        ["How many?", "Sure?"],
        ["Two."],
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "Two."}]},
        ["How many?"],
        ["Two."],
    ),
    "alpaca": ({"instruction": "Count.", "input": "a a", "output": "2"}, ["Count.\n\na a"], ["2"]),
    "gsm8k": ({"question": "1+1?", "answer": "It is <<1+1=2>>2.\n#### 2"}, ["1+1?"], ["It is 2.\n#### 2"]),
    "specbench": ({"question_id": 1, "category": "c", "turns": ["One?", "Two?"]}, ["One?", "Two?"], []),
    "prompt": ({"prompt": "def f():", "entry_point": "f"}, ["def f():"], []),
}


@pytest.mark.parametrize("name", list(ROWS))
def test_each_format_is_detected_and_read(name: str) -> None:
    row, users, reference = ROWS[name]
    assert detect_format(row) == name
    conversation = to_conversation(row, name)  # type: ignore[arg-type]
    assert [message["content"] for message in conversation.messages] == users
    assert list(conversation.reference) == reference


def test_arena_hard_turns_are_objects() -> None:
    assert to_conversation({"turns": [{"content": "Hi"}]}, "specbench").messages[0]["content"] == "Hi"


def test_a_system_turn_is_kept_before_the_first_user_turn() -> None:
    row = {"messages": [{"role": "system", "content": "Be brief."}, USER]}
    assert [m["role"] for m in to_conversation(row, "openai").messages] == ["system", "user"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [USER, USER]}, "where the assistant's belongs"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "turn 0 is the tool's where the user's belongs"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "where the user's belongs"),
        ({"messages": []}, "empty or not a list"),
        ({"messages": [{"role": "user", "content": "  "}]}, "an empty turn"),
        ({"messages": [{"role": "user", "content": 3}]}, "is int, not text"),
    ],
)
def test_a_broken_conversation_is_dropped_with_its_reason(row: dict[str, object], reason: str) -> None:
    with pytest.raises(UnusableRow, match=reason):
        to_conversation(row, "openai")


def test_unknown_fields_name_the_formats_there_are() -> None:
    with pytest.raises(ValueError, match=r"fields \['foo'\].*gsm8k"):
        detect_format({"foo": 1})


def test_duplicates_are_dropped_whatever_their_case_and_spacing(
    tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    source = write_jsonl([{"prompt": "Say it"}, {"prompt": " say  IT "}, {"prompt": "Say that"}])
    prompts(str(source), tmp_path / "out")
    assert [p.messages[0]["content"] for p in read_prompts(tmp_path / "out")] == ["Say it", "Say that"]
    dropped = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    assert dropped[0]["place"] == f"{source}:2"
    assert dropped[0]["reason"] == f"the same prompt as {source}:1"


def test_an_empty_system_turn_makes_no_other_prompt(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    def read(content: str | None, name: str) -> list[tuple[str, str]]:
        systems = [] if content is None else [{"role": "system", "content": content}]
        rows = [
            {"messages": [*systems, {"role": "user", "content": f"Question {n}"}], "source": "s"} for n in range(40)
        ]
        prompts(str(write_jsonl(rows)), tmp_path / name, validation=0.3, test=0.3)
        return [(prompt.id, prompt.split) for prompt in read_prompts(tmp_path / name)]

    without = read(None, "without")
    assert read("", "empty") == read(" \n", "blank") == without
    assert not {key for key, _ in read("Be brief.", "brief")} & {key for key, _ in without}
    both = write_jsonl([{"messages": [USER]}, {"messages": [{"role": "system", "content": ""}, USER]}])
    prompts(str(both), tmp_path / "both")
    [dropped] = (tmp_path / "both" / "dropped.jsonl").read_text().splitlines()
    assert json.loads(dropped)["reason"] == f"the same prompt as {both}:1"


def test_the_last_line_names_the_formats_where_there_are_several(
    tmp_path: Path, write_jsonl: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    prompts(str(write_jsonl([ROWS["openai"][0], ROWS["gsm8k"][0], {"foo": 1}])), tmp_path / "mixed")
    assert "; formats gsm8k, openai; 1 row dropped" in capsys.readouterr().out.splitlines()[-1]
    prompts(str(write_jsonl([ROWS["openai"][0]])), tmp_path / "same")
    assert "format" not in capsys.readouterr().out.splitlines()[-1].replace(str(tmp_path), "")


def test_splits_are_disjoint_near_their_shares_and_do_not_move_when_rows_are_added(
    tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    rows = [{"prompt": f"Question {n}"} for n in range(600)]
    prompts(str(write_jsonl(rows[:400])), tmp_path / "few", validation=0.2, test=0.2)
    prompts(str(write_jsonl(rows)), tmp_path / "many", validation=0.2, test=0.2)
    few = {p.id: p.split for p in read_prompts(tmp_path / "few")}
    many = {p.id: p.split for p in read_prompts(tmp_path / "many")}
    assert all(many[key] == split for key, split in few.items())
    assert 80 < sum(split == "test" for split in many.values()) < 160
    assert len(read_prompts(tmp_path / "many", "test")) == sum(split == "test" for split in many.values())


def test_a_row_keeps_the_split_it_names(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    rows = [{"id": "a", "messages": [USER], "split": "test", "source": "sums/add", "answer": 2}]
    prompts(str(write_jsonl(rows)), tmp_path / "out", test=0.0)
    assert [(p.split, p.source) for p in read_prompts(tmp_path / "out")] == [("test", "sums/add")]


def test_each_row_of_a_file_is_read_by_its_own_fields(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    prompts(str(write_jsonl([row for row, _, _ in ROWS.values()])), tmp_path / "out")
    asked = [[message["content"] for message in prompt.messages] for prompt in read_prompts(tmp_path / "out")]
    assert asked == [users for _, users, _ in ROWS.values()]
    config = json.loads((tmp_path / "out" / "provenance.json").read_text())["config"]
    assert config["format"] == "alpaca, gsm8k, openai, prompt, sharegpt, specbench"


def test_the_projects_own_prompt_file_reads_back_the_same(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    prompts(str(write_jsonl([ROWS["openai"][0], ROWS["openai"][0] | {"x": 1}])), tmp_path / "one")
    prompts(str(tmp_path / "one" / "prompts.jsonl"), tmp_path / "two")
    first, second = read_prompts(tmp_path / "one")[0], read_prompts(tmp_path / "two")[0]
    assert (first.messages, first.reference, first.split) == (second.messages, second.reference, second.split)


def test_json_parquet_and_text_files_are_read(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "a.json").write_text(json.dumps([{"prompt": "One"}, {"prompt": "Two"}]))
    pq.write_table(pa.table({"question": ["One?"], "answer": ["1"]}), tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_text("Once upon a time.\nMore.\n<|endoftext|>\nA cat sat.\n<|endoftext|>\n")
    (tmp_path / "d.txt").write_text("First story.\n\nSecond story.\n")
    for name in ("a.json", "b.parquet", "c.txt", "d.txt"):
        prompts(str(tmp_path / name), tmp_path / "out" / name, prefix_words=2)
    assert len(read_prompts(tmp_path / "out" / "a.json")) == 2
    assert read_prompts(tmp_path / "out" / "b.parquet")[0].reference == ("1",)
    stories = read_prompts(tmp_path / "out" / "c.txt")
    assert [story.text for story in stories] == ["Once upon a time.\nMore.", "A cat sat."]
    assert stories[0].prefix_words == 2
    assert len(read_prompts(tmp_path / "out" / "d.txt")) == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.jsonl", None, "no such file"),
        ("empty.jsonl", "", "empty"),
        ("empty.json", "", "empty"),
        ("blank.txt", "\n\n", "empty"),
        ("bad.jsonl", '{"prompt": \n', r"bad\.jsonl:1: not valid JSON"),
        ("bad.json", '[{"prompt": "a"},\n{]', r"bad\.json:2: not valid JSON"),
        ("lines.json", '{"prompt": "a"}\n{"prompt": "b"}\n', r"name the file \.jsonl"),
        ("object.json", '{"prompt": "a"}', "is a list of objects"),
        ("list.json", "[1]", r"list\.json\[0\]: not a JSON object but int"),
        ("torn.parquet", "PAR1", "not a whole Parquet file"),
        ("rows.xlsx", "a,b", "suffix '.xlsx'"),
        ("torn.csv", 'a\n"b', "cannot be read as CSV"),
        ("unknown.jsonl", '{"foo": 1}\n', r"unknown\.jsonl:1: no known format .*--format"),
        ("useless.jsonl", '{"messages": []}\n', "no usable prompt"),
    ],
)
def test_bad_input_names_the_place_and_the_remedy(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        prompts(str(tmp_path / name), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_hub_id_is_read_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[object, ...]] = []

    def load(name: str, config: str | None, split: str) -> datasets.Dataset:
        asked.append((name, config, split))
        return datasets.Dataset.from_list([{"question": "1+1?", "answer": "2"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    prompts("openai/gsm8k", tmp_path / "out", hub_config="main", hub_split="test")
    assert asked == [("openai/gsm8k", "main", "test")]
    assert read_prompts(tmp_path / "out")[0].source == "openai/gsm8k"


def test_a_hub_id_that_cannot_be_had_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(name: str, config: str | None, split: str) -> datasets.Dataset:
        raise ConnectionError("offline\ndetails")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(
        ValueError, match=r"neither a file here nor a data set that could be loaded from the hub: offline$"
    ):
        prompts("some/set", tmp_path / "out")


def test_shares_beyond_the_whole_are_refused(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="together at most 1"):
        prompts(str(write_jsonl([{"prompt": "a"}])), tmp_path / "out", validation=0.6, test=0.6)


def test_an_empty_split_names_those_there_are(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    prompts(str(write_jsonl([{"prompt": "a"}])), tmp_path / "out", validation=0.0, test=0.0)
    with pytest.raises(ValueError, match="'test'; it has 1 train"):
        read_prompts(tmp_path / "out", "test")


@pytest.mark.parametrize(
    ("file", "row_format", "rows"),
    [
        ("prompts/gsm8k_train.jsonl", "gsm8k", 7473),
        ("prompts/spec_bench.jsonl", "specbench", 480),
        ("prompts/arena_hard.jsonl", "specbench", 500),
        ("prompts/humaneval.jsonl", "prompt", 164),
        ("prompts/arc_challenge_train.json", "alpaca", 1118),
    ],
)
def test_public_prompt_sets_are_read_whole(tmp_path: Path, file: str, row_format: str, rows: int) -> None:
    source = Path(__file__).parents[3] / "shared" / "data" / file
    if not source.exists():
        pytest.skip(f"the public data is not at {source}")
    prompts(str(source), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "provenance.json").read_text())["config"]
    assert config["format"] == row_format
    assert len(read_prompts(tmp_path / "out")) == rows

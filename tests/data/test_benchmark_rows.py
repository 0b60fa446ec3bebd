"""Files of Spec-Bench and SPEED-Bench give the same prompts in each of the forms in which they go round."""

import gzip
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import make_tokenizer

from draftsmith.data.chat_template import ChatTemplate
from draftsmith.data.corpus import Corpus
from draftsmith.data.prompts import prompts, read_prompts, read_question_set
from draftsmith.data.sources import read_rows
from draftsmith.files import read_jsonl
from draftsmith.json_rows import Dropped

ROWS: list[dict[str, Any]] = [
    {"question_id": "7a", "category": "coding", "sub_category": None, "turns": ["Sort.", "Faster."], "multiturn": True},
    {"question_id": "7b", "category": "qa", "sub_category": "stem", "turns": ["Why?"], "multiturn": False},
]
ROWS = [row | {"difficulty": "hard", "source": "ours", "src_id": None} for row in ROWS]
NOTE = "FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE USING SPECDEC_BENCH"


def with_turns(turns: Callable[[list[str]], dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "turns"} | turns(row["turns"]) for row in ROWS]


FORMS = {
    "texts": ROWS,
    "JSON text": with_turns(lambda turns: {"turns": json.dumps(turns)}),
    "objects": with_turns(lambda turns: {"turns": [{"content": text} for text in turns]}),
    "messages": with_turns(lambda turns: {"messages": [{"role": "user", "content": text} for text in turns]}),
    "prompts in turns": with_turns(lambda turns: {"prompt": [{"role": "user", "content": text} for text in turns]}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_every_form_of_a_benchmark_asks_all_turns_under_its_categories(form: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"bench{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(FORMS[form]), path)
    else:
        lines = [json.dumps(row) for row in FORMS[form]]
        path.write_text("\n".join(lines) if suffix == ".jsonl" else f"[{','.join(lines)}]")
    for read in (read_question_set(path), _through_the_command(path, tmp_path / "out")):
        kept = [(p.category, p.sub_category, p.difficulty, [m["content"] for m in p.messages]) for p in read]
        assert kept == [("coding", None, "hard", ["Sort.", "Faster."]), ("qa", "stem", "hard", ["Why?"])]


def _through_the_command(path: Path, out: Path) -> list[Any]:
    prompts(str(path), out)
    return read_prompts(out)


def test_a_question_that_somebody_has_yet_to_fetch_is_dropped(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    dropped: list[Dropped] = []
    note = ROWS[0] | {"turns": [f"{NOTE}\n\nSummarise: {{article}}", "Shorter."]}
    [kept] = read_question_set(write_jsonl([note, ROWS[1]]), dropped=dropped)
    assert kept.category == "qa"
    assert "the placeholder of SPEED-Bench instead of a question" in dropped[0].reason


def test_turns_that_are_a_single_text_are_a_single_question(write_jsonl: Callable[..., Path]) -> None:
    [prompt] = read_question_set(write_jsonl([ROWS[0] | {"turns": "Sort."}]))
    assert [message["content"] for message in prompt.messages] == ["Sort."]


def test_two_questions_in_a_row_are_still_a_broken_chat_elsewhere(write_jsonl: Callable[..., Path]) -> None:
    row = {"messages": [{"role": "user", "content": "Sort."}, {"role": "user", "content": "Faster."}]}
    with pytest.raises(ValueError, match="turn 1 is the user's where the assistant's belongs"):
        read_question_set(write_jsonl([row]))


def test_a_table_gives_no_row_the_keys_of_another(tmp_path: Path) -> None:
    calls = [{"name": "weather", "arguments": {"city": "Oslo"}}, {"name": "stock", "arguments": {"symbol": "A"}}]
    rows = [
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [call]}]} for call in calls
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "chats.parquet")
    read = [row for _, row in read_rows(str(tmp_path / "chats.parquet"))]
    assert [row["messages"][1]["tool_calls"][0] for row in read] == calls


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl.gz", gzip.compress(b"{}", mtime=0), "is packed; unpack it first: `gunzip -k"),
        ("rows.jsonl", gzip.compress(b"{}", mtime=0), "is packed; unpack it first: `gunzip -k"),
        ("rows.jsonl.zst", b"\x28\xb5\x2f\xfd....", "unzstd"),
        ("rows.parquet", b"PAR1....PAR1", "is a Parquet file, but one JSON object a line is expected"),
        ("rows.json", b'[\n{"text": "a"}\n]', "is a list, but one JSON object a line is expected"),
    ],
)
def test_a_file_that_is_no_lines_of_json_is_named_with_its_remedy(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    tokenizer = make_tokenizer()
    with pytest.raises(ValueError, match=message):
        Corpus(path, lambda: ChatTemplate(tokenizer), None, 100).survey()
    if "packed" in message:
        with pytest.raises(ValueError, match=message):
            list(read_rows(str(path)))


def test_a_command_that_reads_lines_does_not_call_data_prompts_the_only_reader_of_tables(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"\(JSONL\); `draftsmith data prompts` reads it as it is$"):
        list(read_jsonl(path))


def test_a_spreadsheet_is_no_archive_to_unpack(tmp_path: Path) -> None:
    path = tmp_path / "rows.xlsx"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("xl/worksheets/sheet1.xml", "<worksheet/>")
    with pytest.raises(ValueError, match=r"has the suffix '.xlsx'; rows are read from .jsonl, .json, .csv"):
        list(read_rows(str(path)))
    with pytest.raises(ValueError, match="is a spreadsheet; write its rows as JSON-lines"):
        list(read_jsonl(path))
    path.rename(tmp_path / "rows.zip")
    with pytest.raises(ValueError, match="is packed; unpack it first: `unzip "):
        list(read_rows(str(tmp_path / "rows.zip")))

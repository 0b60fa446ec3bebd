"""Rows of files that other programs wrote: encodings, marks, and single rows that cannot be decoded."""

from pathlib import Path

import pytest

from draftsmith.data.sources import read_rows
from draftsmith.files import JsonlAppender, read_jsonl
from draftsmith.json_rows import MAX_DEPTH, Dropped, UnusableRow, parse_object, summary

MARK = b"\xef\xbb\xbf"
ROW = b'{"prompt": "One?"}'


def nested(depth: int) -> bytes:
    return b'{"a": ' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": "\xff"}', "not UTF-8 text: byte 8 is 0xff"),
        (b'{"a": NaN}', "NaN is no number of JSON"),
        (b'{"a": -Infinity}', "-Infinity is no number of JSON"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' occurs twice"),
        (b'{"a": ' + b"1" * 5000 + b"}", "a number has too many digits"),
        (nested(MAX_DEPTH + 1), "nested more than 100 deep"),
        (nested(100_000), "nested more than 100 deep"),
        (b'{"a": ["x", {"b\\ud83d": 1}]}', r"half a surrogate pair (\ud83d)"),
        (b'{"a": "\\uDE00"}', r"half a surrogate pair (\ude00)"),
        (b'{"a": "b\\u0000"}', "a NUL character"),
        (b"[1]", "not a JSON object but list"),
    ],
)
def test_a_line_that_is_no_row_says_why(line: bytes, reason: str) -> None:
    with pytest.raises(UnusableRow) as told:
        parse_object(line)
    assert reason in str(told.value)


def test_whole_pairs_escaped_backslashes_and_the_deepest_nesting_are_read() -> None:
    assert parse_object(b'{"a": "\\ud83d\\ude00", "b": "\\\\u0000 \\\\ud83d"}') == {
        "a": "\U0001f600",
        "b": r"\u0000 \ud83d",
    }
    assert parse_object(nested(MAX_DEPTH))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt"])
def test_a_byte_order_mark_is_passed_over_and_utf16_refused(tmp_path: Path, name: str) -> None:
    content = {
        "a.jsonl": ROW + b"\n" + MARK + ROW,
        "a.json": b"[" + ROW + b"," + ROW + b"]",
        "a.txt": b"One?\r\n\r\nTwo?",
    }
    (tmp_path / name).write_bytes(MARK + content[name])
    rows = [row for _, row in read_rows(str(tmp_path / name))]
    assert len(rows) == 2
    assert next(iter(rows[0].values())) == "One?"
    (tmp_path / name).write_bytes(content[name].decode("utf-8-sig").encode("utf-16"))
    with pytest.raises(ValueError, match=r"is UTF-16; .*iconv"):
        list(read_rows(str(tmp_path / name)))


def test_a_bad_element_of_a_list_costs_no_other(tmp_path: Path) -> None:
    elements = [ROW, b'{"a": NaN}', nested(5000), b'{"t": "[,]}\\""}', b'"text, [not] a row"']
    (tmp_path / "a.json").write_bytes(b"[" + b" ,\n".join(elements) + b"]\n")
    dropped: list[Dropped] = []
    rows = list(read_rows(str(tmp_path / "a.json"), dropped=dropped))
    assert [place[-3:] for place, _ in rows] == ["[0]", "[3]"]
    assert rows[1][1] == {"t": '[,]}"'}
    assert [row.place[-3:] for row in dropped] == ["[1]", "[2]", "[4]"]
    (tmp_path / "a.json").write_bytes(b'[{"a": 1},\n{"a": [1}]')
    with pytest.raises(ValueError, match=r"a.json:2: not valid JSON: the list is never closed"):
        list(read_rows(str(tmp_path / "a.json"), dropped=dropped))


def test_documents_of_other_encodings_are_left_out_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("Good.\n\nSch\xf6n.\n\nEnd.".encode("latin-1") + b"\n\nNUL\0")
    dropped: list[Dropped] = []
    assert [row["text"] for _, row in read_rows(str(tmp_path / "a.txt"), dropped=dropped)] == ["Good.", "End."]
    assert [row.reason for row in dropped] == ["not UTF-8 text: byte 4 is 0xf6", "a NUL character"]


def test_parquet_rows_that_python_has_no_value_for_are_left_out(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    years = pa.array([0, 2**60, 0], pa.timestamp("us"))  # the second one is in the year 38,000 or so
    texts = pa.array(["One?", "Two?", "Thr\0ee?"])
    pq.write_table(pa.table({"prompt": texts, "when": years}), tmp_path / "a.parquet")
    dropped: list[Dropped] = []
    assert [row["prompt"] for _, row in read_rows(str(tmp_path / "a.parquet"), dropped=dropped)] == ["One?"]
    assert [row.place[-3:] for row in dropped] == ["[1]", "[2]"]


def test_a_reader_without_a_record_refuses_the_first_bad_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(ROW + b'\n{"a": NaN}\n')
    with pytest.raises(ValueError, match=r"a.jsonl:2: .*NaN.*mend or delete the line"):
        list(read_jsonl(path))
    dropped: list[Dropped] = []
    assert [line for line, _ in read_jsonl(path, dropped)] == [1]
    assert dropped == [Dropped(f"{path}:2", "not valid JSON: NaN is no number of JSON", '{"a": NaN}')]
    with pytest.raises(ValueError, match=r"a.jsonl:2: .*this log was altered from outside"):
        JsonlAppender(path)


def test_a_summary_counts_kinds_of_reasons_with_their_first_places() -> None:
    rows = [Dropped(f"a:{line}", f"turn {line} is empty") for line in (2, 5)] + [Dropped("a:9", "no user turn")]
    assert summary(rows) == "3 rows dropped: a:2: turn 2 is empty (2 such); a:9: no user turn"
    assert summary([]) == "0 rows dropped"
    assert summary(rows[:1]) == "1 row dropped: a:2: turn 2 is empty"


def test_a_row_of_csv_with_too_few_or_many_cells_is_left_out_and_an_empty_cell_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(
        MARK + b'prompt,answer\r\n"One,\nand?",\r\n\r\nTwo?\r\nThree?,3,4\r\nF\0ur?,4\r\nFive?,5\r\n'
    )
    dropped: list[Dropped] = []
    rows = list(read_rows(str(tmp_path / "a.csv"), dropped=dropped))
    assert [row for _, row in rows] == [{"prompt": "One,\nand?", "answer": None}, {"prompt": "Five?", "answer": "5"}]
    assert [place[-3:] for place, _ in rows] == ["[0]", "[4]"]
    assert [row.reason for row in dropped] == [
        "the row has 1 cells, and the header names 2 columns",
        "the row has 3 cells, and the header names 2 columns",
        "a NUL character",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,a\n1,2\n", "2 columns of the name 'a'"),
        (b"a\n\xff\n", "not UTF-8 text: byte 3"),
        (b'a\n"b', "cannot be read as CSV"),
        (b"", "empty"),
    ],
)
def test_a_csv_file_that_is_none_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_rows(str(tmp_path / "a.csv")))


def test_a_null_in_a_column_of_a_table_is_kept_and_one_that_fills_an_object_is_not(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"wrong": None, "tools": {"city": "Oslo"}}, {"wrong": 1, "tools": {"stock": "X"}}]
    pq.write_table(
        pa.Table.from_pylist(
            rows, pa.schema({"wrong": pa.int64(), "tools": pa.struct({"city": pa.string(), "stock": pa.string()})})
        ),
        tmp_path / "a.parquet",
    )
    assert [row for _, row in read_rows(str(tmp_path / "a.parquet"))] == rows

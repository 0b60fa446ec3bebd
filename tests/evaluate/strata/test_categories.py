"""Categories of a prompt file reach the rows, the tables and the picture; files without them look as before."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.image import imread

from draftsmith.data.prompts import prompts, read_prompts
from draftsmith.evaluate.records import Row, Sample, Timed
from draftsmith.evaluate.report import named_bins, named_categories, to_json, to_markdown, write_report
from draftsmith.evaluate.report_rows import Contestant, Setting, make_row
from draftsmith.evaluate.samples import read_samples
from draftsmith.evaluate.strata.categories import Category
from draftsmith.evaluate.strata.contexts import ContextBin
from draftsmith.evaluate.strata.decoded import Decoded, DepthAcceptance
from draftsmith.evaluate.strata_chart import draw_categories, draw_contexts
from draftsmith.models.files.loading import load_tokenizer
from draftsmith.models.tree.limits import DraftLimits

RowMaker = Callable[..., Row]
SPEC_BENCH = Path(__file__).parents[4] / "shared" / "data" / "prompts" / "spec_bench.jsonl"
QUESTIONS = [
    {"question_id": 1, "category": "maths", "sub_category": "sums", "turns": ["What is 2?"], "difficulty": "easy"},
    {"question_id": 2, "category": "maths", "turns": ["What is 3?"], "multiturn": False},
    {"question_id": 3, "category": "tales", "turns": ["Tell one."]},
]
DEPTH = DepthAcceptance(1, 10, 7, 0.7, 0.7)
MATHS = Category("maths", 2, 40, 2.5, (2.25, 2.75), 1.5, (1.25, 1.75), (DEPTH,))
TALES = Category("tales", 1, 9, 1.25, (1.25, 1.25), 0.75, (0.75, 0.75), (DEPTH,))


def runs(accepted: int, seconds: float) -> list[Timed]:
    """Three prompts, 9 tokens each, so many accepted in each cycle."""
    cycles = 8 // (accepted + 1)
    reply = Decoded(tuple(range(9)), (accepted,) * cycles, (3,) * cycles)
    return [Timed((n,), n, 0, seconds * (n + 1), (reply,)) for n in range(3)]


def row_of(*categories: str | None, batch_size: int = 1) -> Row:
    samples = [Sample(str(n), "all", (1,), category) for n, category in enumerate(categories)]
    setting = Setting("tiny", 0.0, "float32", "cpu", batch_size, 64, 1, eos_token_ids=(0,))
    mine = Contestant("mine 1x3", "mine", DraftLimits(draft_length=3))
    return make_row(mine, {"plain": runs(0, 8.0), "mine 1x3": runs(3, 4.0)}, samples, setting)


def test_a_row_has_the_measures_of_each_category() -> None:
    maths, tales = row_of("maths", "tales", "maths").by_category
    assert [(part.category, part.prompts, part.tokens) for part in (maths, tales)] == [
        ("maths", 2, 18),
        ("tales", 1, 9),
    ]
    assert maths.tokens_per_step == 4.0
    assert maths.tokens_per_step_interval == (4.0, 4.0)
    assert maths.speedup == pytest.approx(2.0)
    assert maths.speedup_interval == pytest.approx((2.0, 2.0))
    assert [level.conditional for level in maths.acceptance_by_depth] == [1.0, 1.0, 1.0]


def test_prompts_without_a_category_come_last_and_alone_make_no_categories() -> None:
    assert [part.category for part in row_of(None, "tales", None).by_category] == ["tales", "no category"]
    assert row_of(None, None, None).by_category == ()


def test_a_batch_mixes_categories_so_they_have_no_speed_up() -> None:
    assert {part.speedup for part in row_of("a", "b", "b", batch_size=2).by_category} == {None}


def test_the_report_has_a_matrix_of_categories_and_drafters(make_row: RowMaker) -> None:
    first = make_row(drafter="one", by_category=(MATHS, TALES))
    other = make_row(drafter="two|x", by_category=(replace(MATHS, prompts=1, category="maths"),))
    text = to_markdown("", {}, {}, [make_row(drafter="plain", by_category=(MATHS,)), first, other])
    assert "| category | prompts | one 1x4 | two\\|x 1x4 |" in text
    assert "| maths | 2 | 2.50 (2.25 to 2.75) | 2.50 (2.25 to 2.75), 1 of them |" in text
    assert "| tales | 1 | 1.25 (1.25 to 1.25) | - |" in text
    assert "| maths | 2 | 1.50 (1.25 to 1.75) |" in text
    assert "| maths | one 1x4 | 0.70 / 0.70 |" in text
    (_, row, _) = json.loads(to_json("", {}, {}, [first, first, other]))["rows"]
    assert row["by_category"][0]["tokens_per_step_interval"] == [2.25, 2.75]


def test_a_report_without_categories_has_no_such_part(make_row: RowMaker) -> None:
    assert "By category" not in to_markdown("", {}, {}, [make_row()])
    assert draw_categories(named_categories([make_row()])) is None


def test_the_picture_grows_with_its_categories(make_row: RowMaker) -> None:
    few = draw_categories(named_categories([make_row(by_category=(MATHS, TALES))]))
    many = [replace(MATHS, category=f"c{n}", speedup=None, speedup_interval=None) for n in range(12)]
    more = draw_categories(
        named_categories([make_row(by_category=tuple(many)), make_row(drafter="b", by_category=(TALES,))])
    )
    assert few is not None
    assert more is not None
    assert imread(io.BytesIO(more)).shape[0] > imread(io.BytesIO(few)).shape[0]


def test_the_picture_of_contexts_needs_two_bins(tmp_path: Path, make_row: RowMaker) -> None:
    short, long = ContextBin(0, 256, 2, 9, 18, 2.0, (1.5, 2.5)), ContextBin(256, 1024, 1, 4, 6, 1.5, (1.5, 1.5))
    assert draw_contexts(named_bins([make_row(by_context=(short,))])) is None
    rows = [make_row(by_context=(short, long))]
    write_report(tmp_path, "", {}, {}, rows, context_chart=draw_contexts(named_bins(rows)))
    assert imread(tmp_path / "contexts.png").shape[0] > 300
    assert "| redrafter 1x4 | 256 to 1k | 1 | 4 | 1.50 (1.50 to 1.50) |" in (tmp_path / "report.md").read_text()
    write_report(tmp_path, "", {}, {}, [make_row()])
    assert not (tmp_path / "contexts.png").exists()


def write_questions(path: Path) -> Path:
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist([{"sub_category": None, **row} for row in QUESTIONS]), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_benchmarks_file_is_read_as_it_is(tmp_path: Path, target: Path, suffix: str) -> None:
    file, tokenizer = write_questions(tmp_path / f"bench{suffix}"), load_tokenizer(str(target))
    samples = read_samples(file, tokenizer)
    assert [(each.category, each.turn) for each in samples] == [("maths", 1), ("maths", 1), ("tales", 1)]
    assert (samples[0].sub_category, samples[0].difficulty) == ("sums", "easy")
    prompts(str(file), tmp_path / "prompts", validation=0.0, test=1.0)
    assert read_samples(tmp_path / "prompts", tokenizer) == samples


def test_spec_benchs_own_file_has_its_categories(target: Path) -> None:
    if not SPEC_BENCH.is_file():
        pytest.skip(f"Spec-Bench is not at {SPEC_BENCH}")
    samples = read_samples(SPEC_BENCH, load_tokenizer(str(target)))
    assert len({sample.category for sample in samples}) == 13


def test_a_category_that_is_no_text_is_none(tmp_path: Path) -> None:
    file = tmp_path / "odd.jsonl"
    file.write_text(json.dumps({"turns": ["a"], "category": ["x"], "difficulty": 3}) + "\n")
    prompts(str(file), tmp_path / "out")
    (prompt,) = read_prompts(tmp_path / "out")
    assert (prompt.category, prompt.difficulty) == (None, "3")

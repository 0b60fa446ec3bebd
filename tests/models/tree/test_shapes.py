"""The language of shapes: what is written reads back, and the error for any other text shows an example."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from draftsmith.models import DraftLimits, EarlyStop, SampledChildren
from draftsmith.models.tree.shapes import (
    full_tree,
    is_sampled,
    parse_shape,
    paths_json,
    read_paths,
    shape_text,
    short_shape,
)

EAGLE_LIKE = ((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 2), (0, 0, 0, 0))


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("1x4", DraftLimits(1, 4)),
        ("45x5", DraftLimits(45, 5)),
        ("10x6n60", DraftLimits(10, 6, 60)),
        ("10x6n60m2", DraftLimits(10, 6, 60, merge=2)),
        ("10x6n60lp0.1", DraftLimits(10, 6, 60, 0.1, likeliest=True)),
        ("4x5n12m1p0.01e0.3", DraftLimits(4, 5, 12, 0.01, early_stop=EarlyStop(0.3), merge=1)),
        ("1x8p0.1", DraftLimits(1, 8, None, 0.1)),
        ("3x6n9p0.05", DraftLimits(3, 6, 9, 0.05)),
        ("1x8e0.5", DraftLimits(1, 8, early_stop=EarlyStop(0.5))),
        ("4x5n12p0.01e0.3", DraftLimits(4, 5, 12, 0.01, early_stop=EarlyStop(0.3))),
        ("1x8e0.3g0.5a0.8s0.02r0.25m0.75", DraftLimits(1, 8, early_stop=EarlyStop(0.3, 0.5, 0.02, 0.8, 0.25, 0.75))),
        ("t3.2.1", DraftLimits(paths=full_tree((3, 2, 1)))),
        ("paths:0.0.0.0+0.0.2+0.1+1.0+2", DraftLimits(paths=EAGLE_LIKE)),
        ("paths:0.0+12p0.1", DraftLimits(paths=((0,), (0, 0), (12,)), min_probability=0.1)),
        ("s1.1.1.1", DraftLimits(sampled=SampledChildren((1, 1, 1, 1)))),
        ("s4.2.1", DraftLimits(sampled=SampledChildren((4, 2, 1), "mcsd"))),
        ("b1.1.1", DraftLimits(sampled=SampledChildren((1, 1, 1), "block"))),
        ("k4.2.1e0.6", DraftLimits(sampled=SampledChildren((4, 2, 1), "kseq"), early_stop=EarlyStop(0.6))),
    ],
)
def test_a_shape_reads_as_it_is_written(text: str, limits: DraftLimits) -> None:
    assert parse_shape(text) == limits
    assert shape_text(limits) == text


def some_paths() -> st.SearchStrategy[tuple[tuple[int, ...], ...]]:
    leaves = st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=4).map(tuple), min_size=1, max_size=6)
    return leaves.map(lambda found: tuple({leaf[:end] for leaf in found for end in range(1, len(leaf) + 1)}))


def some_limits() -> st.SearchStrategy[DraftLimits]:
    share = st.floats(0.0, 0.999)
    stops = st.none() | st.builds(EarlyStop, share, st.floats(1e-9, 5.0), share, share, share, share)
    beams = st.builds(
        DraftLimits,
        st.integers(1, 50),
        st.integers(1, 20),
        st.none() | st.integers(1, 99),
        share,
        early_stop=stops,
    )
    static = st.builds(DraftLimits, paths=some_paths(), min_probability=share, early_stop=stops)
    children = st.lists(st.integers(1, 9), min_size=1, max_size=5).map(tuple)
    drawn = st.builds(SampledChildren, children, st.sampled_from(["mcsd", "kseq"])) | st.builds(
        SampledChildren, st.lists(st.just(1), min_size=1, max_size=5).map(tuple), st.just("block")
    )
    merging = st.builds(
        DraftLimits, st.integers(2, 50), st.integers(1, 20), st.integers(1, 99), share, merge=st.integers(1, 4)
    )
    return beams | merging | static | st.builds(DraftLimits, sampled=drawn, early_stop=stops)


@settings(max_examples=150, deadline=None)
@given(some_limits())
def test_every_limits_have_a_text_that_reads_back(limits: DraftLimits) -> None:
    text = shape_text(limits)
    assert parse_shape(text) == limits
    assert not set(text) & set(" ,@=/()'\""), "a shape is one word of a shell and of --drafters"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "4",
        "x4",
        "1x",
        "1x4x2",
        "ax4",
        "1x4 n2",
        "1x4n",
        "t",
        "t3.",
        "s",
        "1x4e",
        "1x4e0.5q2",
        "paths:",
        "tree:a.txt",
    ],
)
def test_what_is_no_shape_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="is not WIDTHxLENGTH, such as 1x4 or 10x4"):
        parse_shape(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0x4", "beam_width is 0; it must be at least 1"),
        ("1x4p1.5", "min_probability is 1.5"),
        ("1x4e1.0", "threshold is 1.0"),
        ("1x4e0.5g0.2g0.3", "one letter twice"),
        ("s2.1p0.1", "cannot be pruned by score"),
        ("paths:0..1", "not a list of leaves"),
        ("t60.60.60", "more than 4096"),
    ],
)
def test_a_shape_that_nobody_can_draft_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_shape(text)


def test_limits_whose_manners_exclude_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="beam_width is 3, but a static or sampled tree"):
        DraftLimits(3, paths=((0,),))
    with pytest.raises(ValueError, match="hangs in the air"):
        DraftLimits(paths=((0,), (1, 0)))


def test_the_order_of_paths_does_not_matter() -> None:
    assert DraftLimits(paths=EAGLE_LIKE[::-1]) == DraftLimits(paths=EAGLE_LIKE)
    assert DraftLimits(paths=EAGLE_LIKE[::-1]).paths == EAGLE_LIKE


def test_a_file_of_paths_reads_back(tmp_path: Path) -> None:
    file = tmp_path / "tree.json"
    file.write_text(paths_json(EAGLE_LIKE))
    assert json.loads(file.read_text()) == [list(path) for path in EAGLE_LIKE]
    assert read_paths(file) == EAGLE_LIKE
    assert parse_shape(f"tree:{file}p0.1e0.4") == DraftLimits(
        paths=EAGLE_LIKE, min_probability=0.1, early_stop=EarlyStop(0.4)
    )


@pytest.mark.parametrize("text", ["{", "{}", "[1, 2]", '[["0"]]', "[[0.5]]", "[[true]]"])
def test_a_file_that_holds_no_tree_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "tree.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"tree.json is not .*such as \[\[0\], \[1\], \[0, 0\]\]"):
        parse_shape(f"tree:{file}")
    with pytest.raises(ValueError, match="does not exist"):
        parse_shape(f"tree:{tmp_path / 'none.json'}")


def test_only_long_static_trees_are_shortened_and_still_told_apart() -> None:
    for text in ("10x6n60p0.05e0.5", "t3.2.1", "paths:0.0+0.1+1.0+2"):
        assert short_shape(text) == text
    one = shape_text(DraftLimits(paths=EAGLE_LIKE))
    other = shape_text(DraftLimits(paths=(*EAGLE_LIKE[:-1], (0, 0, 0, 1))))
    assert short_shape(one, longest=12).startswith("static 9x4 (")
    assert short_shape(one, longest=12) != short_shape(other, longest=12)


@pytest.mark.parametrize("text", ["1x4", "4x4n8", "t2.1", "1x8e0.5", "s1.1", "s3.2.1", "k2.1", "b1.1.1"])
def test_a_shape_is_called_sampled_where_its_tokens_are_drawn(text: str) -> None:
    assert is_sampled(shape_text(parse_shape(text))) == (parse_shape(text).sampled is not None)
    assert not is_sampled("")

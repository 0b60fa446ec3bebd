import io
from collections.abc import Callable
from dataclasses import replace

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from draftsmith.evaluate.chart import draw, draw_depths, draw_rooflines
from draftsmith.evaluate.records import Row
from draftsmith.evaluate.roofline.roofline import Roofline

RowMaker = Callable[..., Row]


@pytest.mark.parametrize("count", [1, 2, 9])
def test_chart_is_a_png_that_grows_with_its_rows(make_row: RowMaker, count: int) -> None:
    image = imread(io.BytesIO(draw([make_row(drafter=f"drafter {i}") for i in range(count)])))
    assert image.shape[0] >= 150 * 3.8
    assert image[..., :3].std() > 0.05


def test_chart_draws_rows_without_drafts(make_row: RowMaker) -> None:
    plain = make_row(drafter="plain", acceptance_by_depth=(), shape="", beam_width=None, tokens_per_step=None)
    assert draw([plain])[:4] == b"\x89PNG"


def test_chart_is_the_same_for_the_same_rows(make_row: RowMaker) -> None:
    assert draw([make_row()]) == draw([make_row()])


@pytest.mark.parametrize(("shapes", "lines"), [(3, 9), (4, 3)])
def test_many_drafters_are_drawn_by_their_fastest_shape(make_row: RowMaker, shapes: int, lines: int) -> None:
    rows = [
        make_row(drafter=f"drafter {who}", shape=f"1x{length}", speedup=1.0 + 0.1 * length)
        for who in range(3)
        for length in range(1, 1 + shapes)
    ]
    axes = Figure().subplots()
    draw_depths(axes, rows, [row.label for row in rows])
    assert len(axes.lines) == lines
    fastest = {f"drafter {who} 1x{shapes}" for who in range(3)}
    assert fastest <= {str(line.get_label()) for line in axes.lines}


STAGES = {"draft": 0.002, "verify": 0.004, "accept": 0.001, "rest": 0.0005}
ROOFLINE = Roofline(8e9, 2**25, 1, 70.0, 1.0, 12_000_000, 300_000, 6_000_000, 5, False, 0.0023, STAGES, STAGES, 0.3)


def test_the_chart_of_rooflines_shows_rows_that_were_clocked(make_row: RowMaker) -> None:
    clocked = [make_row(roofline=ROOFLINE), make_row(drafter="other", roofline=ROOFLINE)]
    image = draw_rooflines(clocked)
    assert image is not None
    assert imread(io.BytesIO(image))[..., :3].std() > 0.05
    assert draw_rooflines([make_row(), *clocked]) == image


def test_rows_without_a_clock_have_no_chart_of_rooflines(make_row: RowMaker) -> None:
    assert draw_rooflines([make_row(), make_row(roofline=replace(ROOFLINE, stage_seconds={}))]) is None

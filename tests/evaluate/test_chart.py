import io
from collections.abc import Callable

import pytest
from matplotlib.image import imread

from draftsmith.evaluate.chart import draw
from draftsmith.evaluate.records import Row

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

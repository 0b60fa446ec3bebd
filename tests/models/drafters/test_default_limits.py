"""How a drafter drafts when nobody says: its family's shape or a general one, no deeper than it has heads."""

import warnings

import pytest
from every_family import fresh
from heads import deep_target
from parallel_heads import FAMILY, ParallelHeads, ParallelHeadsConfig

from draftsmith.models import DraftLimits, Target
from draftsmith.models.drafters.registry import default_limits

GENERAL = DraftLimits(2, 5)


class UnknownConfig(ParallelHeadsConfig):
    model_type = "heads_of_no_record"


class UnknownHeads(ParallelHeads):
    config_class = UnknownConfig


@pytest.fixture(scope="module")
def target() -> Target:
    return deep_target(num_layers=1)


def heads_without_a_shape(target: Target, num_steps: int) -> UnknownHeads:
    """A drafter whose family says nothing of a shape."""
    return UnknownHeads(UnknownConfig.for_target(target.ends, None, num_steps, ""))


def test_a_familys_shape_that_the_drafter_has_heads_for_is_kept_without_a_warning(target: Target) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert default_limits(fresh(FAMILY, target.ends, num_steps=3), GENERAL) == FAMILY.limits


def test_a_familys_shape_that_must_be_cut_gives_a_warning_with_the_remedy(target: Target) -> None:
    with pytest.warns(UserWarning, match=r"family medusa is 3 .*has heads for 2.*train with num_steps 3") as warned:
        limits = default_limits(fresh(FAMILY, target.ends, num_steps=2), GENERAL)
    assert len(warned) == 1
    assert limits == DraftLimits(paths=((0,), (1,), (2,), (0, 0), (0, 1), (1, 0)))


@pytest.mark.parametrize(("num_steps", "length"), [(2, 2), (5, 5), (7, 5)])
def test_a_general_shape_is_no_deeper_than_the_heads_and_gives_no_warning(
    target: Target, num_steps: int, length: int
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert default_limits(heads_without_a_shape(target, num_steps), GENERAL) == DraftLimits(2, length)

"""Every drafter family, and one of these tests alone, for tests that hold for all of them."""

import torch
from parallel_heads import FAMILY as TOY

from draftsmith.models import Drafter, Family, TargetEnds, all_families, register

register(TOY)
EVERY_FAMILY = all_families()
OUR_FAMILIES = tuple(family for family in EVERY_FAMILY if family is not TOY)


def name_of(family: Family) -> str:
    """What a test's name says of a family."""
    return family.name


def fresh(family: Family, ends: TargetEnds, draft_ids: torch.Tensor | None = None, num_steps: int = 3) -> Drafter:
    """A drafter with the family's usual settings and random weights, norms and biases included."""
    settings = family.settings()
    drafter = settings.build(ends, draft_ids, num_steps, "")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return drafter.eval()

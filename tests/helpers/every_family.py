"""Every drafter family, and one of these tests alone, for tests that hold for all of them."""

import inspect
from typing import Any

import torch
from parallel_heads import FAMILY as TOY

from draftsmith.models import (
    PRE_NORM,
    Drafter,
    DrafterFamily,
    Family,
    PackedBatch,
    Target,
    TargetEnds,
    all_families,
    register,
)

register(TOY)
EVERY_FAMILY = all_families()
OUR_FAMILIES = tuple(family for family in EVERY_FAMILY if family is not TOY)
LENGTH = 24
TWO_LAYERS = ("layer.0.output", PRE_NORM)


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


def for_two_layers(family: Family, **chosen: Any) -> DrafterFamily:
    """A family's usual settings, and others, for a target of two layers: a family that chooses among its layers gets both."""
    if "layers" in inspect.signature(family.settings).parameters:
        chosen["layers"] = list(TWO_LAYERS)
    return family.settings(**chosen)


def loss_settings(family: Family) -> dict[str, Any]:
    """What teaches a family the target's own distribution, and its features where its drafters predict them."""
    features = {"feature_weight": 1.0, "logit_weight": 0.1} if family.drafter.predicts_features else {}
    return {"distillation": "path", **features}


def assert_equal_logits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal but for rounding, which is relative to the largest of all numbers that are added up."""
    tolerance = max(1e-4, 1e-5 * float(theirs.abs().max()))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=tolerance)


def batch_of(target: Target, drafter: Drafter) -> PackedBatch:
    """One text of LENGTH random tokens, with the layers that a drafter reads, and the last block's output for its teacher."""
    ids = torch.randint(0, target.ends.vocab_size, (LENGTH,), generator=torch.Generator().manual_seed(0))
    names = tuple({PRE_NORM, *drafter.features})
    with torch.no_grad():
        output = target.prefix(ids[None], layers=names)
    return PackedBatch(
        input_ids=ids,
        loss_mask=torch.arange(LENGTH) >= 2,
        document_ids=torch.zeros(LENGTH, dtype=torch.int64),
        positions=torch.arange(LENGTH),
        hidden={name: output.feature(name)[0].clone() for name in names},
    )

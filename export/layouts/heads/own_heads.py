"""A drafter's heads written out, one for each step: the form that other software's layouts hold.

Owns that form, and the drafter that comes back from it. Knows no layout.

Shape legend: E inputs of a head, Vd draft vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from draftsmith.export.layouts.readback import tensors_of
from draftsmith.models.drafters.drafter_reader import assemble
from draftsmith.models.families.heads import HeadsConfig, HeadsDrafter
from draftsmith.models.target.ends import TargetEnds


@torch.no_grad()
def written_out(drafter: HeadsDrafter, ends: TargetEnds | None, software: str) -> HeadsDrafter:
    """The same drafter with a head for each step; itself where it has them. Sums of a shared head and its differences are rounded once.

    Args:
        drafter: of any settings.
        ends: the target's, where the drafter borrows its head.
        software: whose layout it is for, for messages.

    Returns:
        The drafter, attached to nothing unless it is the same one.

    Raises:
        ValueError: a prefix layer; or the head is the target's, and no target is at hand.
    """
    config = drafter.config
    if config.prefix_layer is not None:
        raise ValueError(
            f"this drafter has a prefix_layer, which {software} layout does not hold; export it with --layout draftsmith"
        )
    if config.head == "per_step":
        return drafter
    if config.head == "target":
        if ends is None:
            raise ValueError(
                f"this drafter scores with the target's head, which {software} layout holds for each step; add --target"
            )
        drafter = drafter.bound(ends)
    kept = {name: tensor for name, tensor in tensors_of(drafter).items() if name.startswith(("steps.", "d2t"))}
    heads = {f"heads.{step}.weight": _head(drafter, step) for step in range(config.num_draft_steps)}
    fields = config.to_dict() | {"head": "per_step", "rank": 0}
    return assemble(HeadsDrafter, HeadsConfig.from_dict(fields), kept | heads)


def _head(drafter: HeadsDrafter, step: int) -> Tensor:
    """[Vd, E]: the head of one step, in the drafter's dtype on the CPU."""
    weight = drafter.step_weight(step).to(drafter.dtype)
    if drafter.difference is not None:
        mix = drafter.mix[step].weight
        assert isinstance(mix, Tensor)
        weight = weight + drafter.difference.weight @ mix
    return weight.cpu().contiguous()

"""What rides through the target's forward behind the tokens of a text, for checks that feed a drafter the text itself.

Owns that, and nothing of what is checked.

Shape legend: T tokens of a text, E of them, K riders of each, D hidden.
"""

from __future__ import annotations

from torch import Tensor

from draftsmith.evaluate.doctor.case import NotChecked
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.rollout import PackedBatch
from draftsmith.models.trunk.text_riders import ride_behind


def riding(drafter: Drafter, batch: PackedBatch, anchors: Tensor, num_steps: int) -> Tensor:
    """[1, E, K D]: what rides through the target's forward behind tokens of a text.

    Args:
        drafter: attached to a whole target's ends.
        batch: the text.
        anchors: int64 [E], the tokens.
        num_steps: K, of the draft.

    Raises:
        NotChecked: only the target's ends are loaded.
    """
    trunk, riders = drafter.ends.trunk, drafter.riders
    if trunk is None or riders is None:
        raise NotChecked("this drafter drafts through the target's own blocks: leave --ends-only out")
    states = ride_behind(trunk, riders.first(num_steps), batch.input_ids, batch.positions, batch.document_ids, anchors)
    return states.transpose(0, 1).flatten(1)[None]

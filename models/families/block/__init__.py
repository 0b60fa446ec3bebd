"""Block drafters: all slots of a draft in one pass of a few decoder layers over the target's states.

Too long for one file, the family has a room: `block_config.py` (its fields), `block_drafter.py` (weights, training, start of a draft),
`block_draft.py` (a draft), `block_layer.py`, `block_correction.py`, `block_confidence.py` (what it is made of), and `block_family.py`
(settings and record).
"""

from draftsmith.models.families.block.block_config import BlockConfig, default_layers
from draftsmith.models.families.block.block_drafter import BlockDrafter
from draftsmith.models.families.block.block_family import BlockFamily

__all__ = ["BlockConfig", "BlockDrafter", "BlockFamily", "default_layers"]

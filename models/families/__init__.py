"""Drafter families: a file or a room for each, with its record ``FAMILY``. A module here with such a record is a family of the package."""

from draftsmith.models.families.block.block_config import BlockConfig
from draftsmith.models.families.block.block_drafter import BlockDrafter
from draftsmith.models.families.eagle import Eagle
from draftsmith.models.families.eagle3 import Eagle3, Eagle3Config
from draftsmith.models.families.eagle_config import EagleConfig
from draftsmith.models.families.heads import HeadsConfig, HeadsDrafter
from draftsmith.models.families.redrafter import ReDrafter, ReDrafterConfig
from draftsmith.models.families.riders.chimera import Chimera, ChimeraConfig
from draftsmith.models.families.riders.mtp import MtpConfig, MtpHead
from draftsmith.models.families.riders.rider_drafter import RiderConfig, RiderDrafter

__all__ = [
    "BlockConfig",
    "BlockDrafter",
    "Chimera",
    "ChimeraConfig",
    "Eagle",
    "Eagle3",
    "Eagle3Config",
    "EagleConfig",
    "HeadsConfig",
    "HeadsDrafter",
    "MtpConfig",
    "MtpHead",
    "ReDrafter",
    "ReDrafterConfig",
    "RiderConfig",
    "RiderDrafter",
]

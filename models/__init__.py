"""Models: the target seam, the drafter seam, and one file a drafter family."""

from draftsmith.models.drafters.draft_lm import LMDrafter, load_draft_lm
from draftsmith.models.drafters.drafter import Cycle, Drafter, DrafterConfig, Emitted, Opening
from draftsmith.models.drafters.eagle import Eagle, Eagle3
from draftsmith.models.drafters.eagle_config import Eagle3Config, EagleConfig
from draftsmith.models.drafters.redrafter import ReDrafter, ReDrafterConfig
from draftsmith.models.drafters.rollout import PackedBatch, Rollout, data_rollout, local_rollout
from draftsmith.models.files.fingerprint import template_fingerprint, tokenizer_fingerprint
from draftsmith.models.files.loading import load_tokenizer
from draftsmith.models.target.target import PRE_NORM, Target, TargetEnds, TargetOutput
from draftsmith.models.tree.limits import DraftLimits, EarlyStop, SampledChildren
from draftsmith.models.tree.slot_cache import KeptRows, SlotCache
from draftsmith.models.tree.tree import DraftTree, root_tree, tree_from_layers, tree_from_paths

__all__ = [
    "PRE_NORM",
    "Cycle",
    "DraftLimits",
    "DraftTree",
    "Drafter",
    "DrafterConfig",
    "Eagle",
    "Eagle3",
    "Eagle3Config",
    "EagleConfig",
    "EarlyStop",
    "Emitted",
    "KeptRows",
    "LMDrafter",
    "Opening",
    "PackedBatch",
    "ReDrafter",
    "ReDrafterConfig",
    "Rollout",
    "SampledChildren",
    "SlotCache",
    "Target",
    "TargetEnds",
    "TargetOutput",
    "data_rollout",
    "load_draft_lm",
    "load_tokenizer",
    "local_rollout",
    "root_tree",
    "template_fingerprint",
    "tokenizer_fingerprint",
    "tree_from_layers",
    "tree_from_paths",
]

"""Models: the target seam, the drafter seam, and one file a drafter family."""

from draftsmith.models.cache import KeptRows, SlotCache
from draftsmith.models.draft_lm import LMDrafter, load_draft_lm
from draftsmith.models.drafter import Cycle, Drafter, DrafterConfig, Emitted, Opening
from draftsmith.models.eagle import Eagle, Eagle3
from draftsmith.models.eagle_config import Eagle3Config, EagleConfig
from draftsmith.models.fingerprint import template_fingerprint, tokenizer_fingerprint
from draftsmith.models.limits import DraftLimits, EarlyStop, SampledChildren
from draftsmith.models.loading import load_tokenizer
from draftsmith.models.redrafter import ReDrafter, ReDrafterConfig
from draftsmith.models.rollout import PackedBatch, Rollout, data_rollout, local_rollout
from draftsmith.models.target import PRE_NORM, Target, TargetEnds, TargetOutput
from draftsmith.models.tree import DraftTree, root_tree, tree_from_layers, tree_from_paths

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

"""Models: the target seam, the drafter seam, and one file a drafter family."""

from draftsmith.models.drafter import (
    Drafter,
    DrafterConfig,
    DraftLimits,
    Emitted,
    PackedBatch,
    Rollout,
    data_rollout,
    local_rollout,
)
from draftsmith.models.fingerprint import template_fingerprint, tokenizer_fingerprint
from draftsmith.models.redrafter import ReDrafter, ReDrafterConfig
from draftsmith.models.target import PRE_NORM, Target, TargetEnds, TargetOutput, load_tokenizer
from draftsmith.models.tree import DraftTree, root_tree, tree_from_layers, tree_from_paths

__all__ = [
    "PRE_NORM",
    "DraftLimits",
    "DraftTree",
    "Drafter",
    "DrafterConfig",
    "Emitted",
    "PackedBatch",
    "ReDrafter",
    "ReDrafterConfig",
    "Rollout",
    "Target",
    "TargetEnds",
    "TargetOutput",
    "data_rollout",
    "load_tokenizer",
    "local_rollout",
    "root_tree",
    "template_fingerprint",
    "tokenizer_fingerprint",
    "tree_from_layers",
    "tree_from_paths",
]

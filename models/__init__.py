"""Models: the target seam, the drafter seam, and one file a drafter family.

The names of this package are what drafter families of other packages are written with.
"""

from draftsmith.models.drafters.draft_lm import LMDrafter, load_draft_lm
from draftsmith.models.drafters.draft_records import Cycle, DraftState, Emitted, Opening
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.drafter_config import DrafterConfig
from draftsmith.models.drafters.family import About, DrafterFamily, Family
from draftsmith.models.drafters.registry import all_families, register, registry
from draftsmith.models.drafters.rollout import PackedBatch, Rollout, data_rollout, local_rollout
from draftsmith.models.families import *  # noqa: F403 - the names of the package's own families
from draftsmith.models.families import __all__ as _of_families
from draftsmith.models.files.fingerprint import template_fingerprint, tokenizer_fingerprint
from draftsmith.models.files.loading import load_tokenizer
from draftsmith.models.slots.slot_cache import KeptRows, SlotCache
from draftsmith.models.target.target import PRE_NORM, Target, TargetEnds, TargetOutput
from draftsmith.models.tree.limits import DraftLimits, EarlyStop, SampledChildren
from draftsmith.models.tree.search import Expander
from draftsmith.models.tree.shapes_by_rows import ShapesByRows
from draftsmith.models.tree.tree import DraftTree, root_tree, tree_from_layers, tree_from_paths

__all__ = [
    "PRE_NORM",
    "About",
    "Cycle",
    "DraftLimits",
    "DraftState",
    "DraftTree",
    "Drafter",
    "DrafterConfig",
    "DrafterFamily",
    "EarlyStop",
    "Emitted",
    "Expander",
    "Family",
    "KeptRows",
    "LMDrafter",
    "Opening",
    "PackedBatch",
    "Rollout",
    "SampledChildren",
    "ShapesByRows",
    "SlotCache",
    "Target",
    "TargetEnds",
    "TargetOutput",
    "all_families",
    "data_rollout",
    "load_draft_lm",
    "load_tokenizer",
    "local_rollout",
    "register",
    "root_tree",
    "template_fingerprint",
    "tokenizer_fingerprint",
    "tree_from_layers",
    "tree_from_paths",
    *_of_families,
]

registry()  # makes the package's own families known to AutoModel

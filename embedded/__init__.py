"""The embedded world: a corpus of sums, and the small target and draft LM trained on it, shipped with the package.

Owns where the models lie and the corpus's public names. Loads nothing heavier than the corpus.
"""

from importlib.resources import files as _resources
from pathlib import Path
from typing import Literal

from draftsmith.embedded.sums import (
    ALL_WORDINGS,
    DRAFT_STYLE,
    TARGET_STYLE,
    Problem,
    Split,
    Step,
    Verdict,
    check,
    distinct_problems,
    render,
    sample_problems,
    write_prompts,
)

__all__ = [
    "ALL_WORDINGS",
    "DRAFT_STYLE",
    "TARGET_STYLE",
    "Problem",
    "Split",
    "Step",
    "Verdict",
    "check",
    "distinct_problems",
    "path",
    "render",
    "sample_problems",
    "write_prompts",
]

ModelName = Literal["target", "draft_lm"]


def path(name: ModelName) -> Path:
    """The Hugging Face directory of an embedded model, for ``from_pretrained``.

    Raises:
        ValueError: there is no embedded model of that name.
    """
    if name not in ("target", "draft_lm"):
        raise ValueError(f"embedded model {name!r} is not known; use 'target' or 'draft_lm'")
    return Path(str(_resources("draftsmith.embedded"))) / name

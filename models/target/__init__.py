"""The target seam: a frozen causal LM, its ends, its context and what it reads before it replies."""

from draftsmith.public import names_of

__getattr__ = names_of("draftsmith.models.target.target")

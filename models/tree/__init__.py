"""The draft tree: its nodes, the searches that build it, their limits, masks, noise and cache slots."""

from draftsmith.public import names_of

__getattr__ = names_of("draftsmith.models.tree.tree")

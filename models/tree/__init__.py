"""The draft tree: its nodes, the searches that build it, their limits, masks and noise."""

from draftsmith.public import names_of

__getattr__ = names_of("draftsmith.models.tree.tree")

"""The target's decoder blocks, run with explicit masks, positions and caches, and the proof that this is exact."""

from draftsmith.public import names_of

__getattr__ = names_of("draftsmith.models.trunk.trunk")

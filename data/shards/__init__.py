"""The format of a hidden-state cache: shards, their manifest, lengths and checks."""

from draftsmith.public import names_of

__getattr__ = names_of("draftsmith.data.shards.shards")

"""The hidden-state cache: making it, reading it, showing it."""

from draftsmith.public import names_of

__getattr__ = names_of("draftsmith.data.cache.reader")

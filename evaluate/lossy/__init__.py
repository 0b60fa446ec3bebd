"""`draftsmith judge evaluate`: what lossy rules gain and what they cost."""

from draftsmith.public import names_of

__getattr__ = names_of("draftsmith.evaluate.lossy.lossy")

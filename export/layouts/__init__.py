"""The layouts a drafter is exported in, one module each."""

from draftsmith.public import names_of

__getattr__ = names_of("draftsmith.export.layouts.layouts")

"""Checkers: is an answer right, and where does it go wrong?"""

from draftsmith.public import names_of

__getattr__ = names_of("draftsmith.label.checkers.checkers")

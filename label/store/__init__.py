"""The store of labels: answers, assignments, and a log of what every annotator said."""

from draftsmith.public import names_of

__getattr__ = names_of("draftsmith.label.store.store")

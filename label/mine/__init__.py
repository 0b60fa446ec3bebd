"""Mining: which of a draft LM's tokens leave the target's answer as it is."""

from draftsmith.public import names_of

__getattr__ = names_of("draftsmith.label.mine.mine_command")

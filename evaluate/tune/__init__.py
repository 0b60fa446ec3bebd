"""`draftsmith tune`: which draft shape is fastest on this machine?"""

from draftsmith.public import names_of

__getattr__ = names_of("draftsmith.evaluate.tune.tune")

"""draftsmith: train draft heads for speculative decoding, prove them lossless, export them."""

from draftsmith.moved import MOVED
from draftsmith.public import answer_for_moved

__version__ = "0.1.0"

answer_for_moved(MOVED)

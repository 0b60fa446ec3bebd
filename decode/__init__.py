"""Decoding: draft, verify, accept."""

from draftsmith.decode.batch import Generation
from draftsmith.decode.engine import Engine
from draftsmith.decode.greedy_continuations import greedy_continuations
from draftsmith.decode.ledger import Ledger
from draftsmith.decode.sampling import GenerationSettings

__all__ = ["Engine", "Generation", "GenerationSettings", "Ledger", "greedy_continuations"]

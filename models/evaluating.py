"""Evaluation mode for a while: what is lent for inference comes back as it was.

Owns this one context. Knows nothing of what is run inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(module: nn.Module | None) -> Iterator[None]:
    """Evaluation mode inside; afterwards every part of the module is in training or evaluation as before. None does nothing."""
    training = [] if module is None else [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True

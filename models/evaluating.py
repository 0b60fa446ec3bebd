"""Evaluation mode for a while: a module that is used for inference gets its own modes back.

Owns this one context. Knows nothing of what is run inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(module: nn.Module | None) -> Iterator[None]:
    """Put a module into evaluation mode inside; afterwards every part of it trains or evaluates as before.

    Args:
        module: of any kind; None does nothing.

    Yields:
        Once, nothing.
    """
    training = [] if module is None else [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True

"""Verification: which drafted tokens the target keeps, without loss or by a lossy rule."""

from draftsmith.public import names_of

__getattr__ = names_of("draftsmith.decode.verify.lossless")

"""Decoding behind the ``generate`` of a Transformers model."""

"""Decoding: what rounding changes."""

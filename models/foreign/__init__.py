"""Drafter folders of other software: what a reader of one is, and the kinds that are known by name only."""

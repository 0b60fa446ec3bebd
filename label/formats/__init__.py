"""Labelled answers in the formats of other projects."""

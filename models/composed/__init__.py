"""Drafters whose folder is a config: made of other drafters, or of nothing but the text."""

"""Measures over parts of an evaluation: by category of the prompts, and by length of the context."""

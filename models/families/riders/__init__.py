"""Families whose drafts come out of the target's own layers: rows that ride through it, and heads that it was trained with."""

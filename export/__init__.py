"""Trained drafters as files that others read: one module a serving format."""

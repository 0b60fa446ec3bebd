"""Exported folders in other software."""

"""Distilling an ordinary draft LM towards its target."""

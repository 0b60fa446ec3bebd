"""Caches of hidden states: how fast they are written and read, and what eight bits cost."""

"""Families that lie close to the target: rows that ride through it, a layer that it was trained with, and a head beside EAGLE-1."""

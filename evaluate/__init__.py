"""Exactness, acceptance and speed, measured and reported."""

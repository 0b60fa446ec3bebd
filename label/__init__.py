"""Labelled answers: where an answer first goes wrong, who said so, and a store in which no such word is ever lost."""

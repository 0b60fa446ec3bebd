"""Drafter folders of other software: what a reader of one is, and how kinds are told apart."""

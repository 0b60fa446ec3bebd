"""Drafter folders of other software: their kinds, what their configs say, and the record of how a layout is read."""

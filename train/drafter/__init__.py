"""Training a drafter of any family: its module, objective and losses."""

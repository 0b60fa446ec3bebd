"""Training a drafter of any family: its module, objective, losses and callbacks."""

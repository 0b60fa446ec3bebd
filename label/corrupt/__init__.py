"""Right answers with one error of a known place, for a judge to learn from."""

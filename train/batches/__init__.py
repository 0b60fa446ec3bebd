"""Training batches, from a hidden-state cache or from the target in the loop."""

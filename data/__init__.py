"""Text in, cached features out: prompts, the target's own replies, token masks, and the hidden-state cache."""

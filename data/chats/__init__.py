"""Chat turns: what their fields mean, what of them is trained on, and the mode that a conversation is in."""

"""The target's own replies to prompts: the command, and the sources that generate them."""

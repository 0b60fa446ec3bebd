"""Back-off language models of a few tokens."""

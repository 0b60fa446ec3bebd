"""Training the embedded target and draft LM from scratch."""

"""What draft heads and draft LMs gain: tokens per step, speed-up, adaptation."""

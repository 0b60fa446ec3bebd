"""Layouts of drafters with a network and an output head for each step: Medusa, and the MLP speculator."""

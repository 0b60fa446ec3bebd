"""Layouts of block drafters: z-lab's, and that of the speculators package."""

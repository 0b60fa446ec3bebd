"""Losses, modules, data loading and callbacks: the one package that knows Lightning."""

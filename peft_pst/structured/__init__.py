"""Physically smaller models: what is entirely pruned is removed."""

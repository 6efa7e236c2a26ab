"""Checkpoints: whether one is whole, and which one it is."""

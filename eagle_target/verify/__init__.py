"""Compares a target with transformers."""

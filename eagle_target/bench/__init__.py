"""Measures targets: engines, transports and encodings against each other, and one engine's values against another's."""

"""The inprocess transport."""

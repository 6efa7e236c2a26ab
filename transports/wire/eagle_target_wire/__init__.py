"""The wire transport."""

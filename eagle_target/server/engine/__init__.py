"""The engine: what waits, what runs, what is answered."""

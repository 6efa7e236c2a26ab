"""What both ends agree on; no computing, no I/O."""

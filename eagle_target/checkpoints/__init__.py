"""Whether a checkpoint is whole: its files, and what transformers makes of them."""

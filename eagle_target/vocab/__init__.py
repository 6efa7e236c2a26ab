"""Draft vocabularies: counting tokens, and mappings in files."""

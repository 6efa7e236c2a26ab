"""Hugging Face transformers adapter."""

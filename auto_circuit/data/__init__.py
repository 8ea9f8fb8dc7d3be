"""Prompt pairs and where they come from."""

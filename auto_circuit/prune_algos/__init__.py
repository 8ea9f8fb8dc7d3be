"""Algorithms that score nodes: one a file."""

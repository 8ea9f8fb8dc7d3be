"""Replacing what nodes write."""

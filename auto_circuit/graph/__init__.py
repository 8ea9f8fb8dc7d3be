"""Nodes and their scores."""

"""Objectives and measures of circuits: one idea a file."""

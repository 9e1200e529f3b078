"""Measures of a model on text."""

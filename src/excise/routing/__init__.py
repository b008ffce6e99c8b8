"""Gradient routing: which part of a model a token reads and which part it writes."""

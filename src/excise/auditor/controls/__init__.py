"""Positive controls: models that hide what they know."""

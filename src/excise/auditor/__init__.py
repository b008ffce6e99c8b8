"""Attacks on edited models, read between reference models."""

"""Scores: one value per row, with unit, direction, chance and a versioned definition."""

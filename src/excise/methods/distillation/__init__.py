"""Methods that unlearn, damage and distil: what a student never learns it cannot recall."""

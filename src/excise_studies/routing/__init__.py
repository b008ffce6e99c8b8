"""Studies of gradient routing."""

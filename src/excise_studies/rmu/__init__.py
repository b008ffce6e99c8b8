"""Studies of RMU."""

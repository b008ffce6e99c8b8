"""Studies of distillation."""

"""Training: the one loop, its optimizers and state, and worker processes."""

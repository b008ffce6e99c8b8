"""Reference models, levels of depth, residual bits, power."""

"""Rows, units, roles and labels: from files to the stream that models read."""

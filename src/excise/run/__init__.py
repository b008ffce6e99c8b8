"""The straight line: a request in, a record and its report out."""

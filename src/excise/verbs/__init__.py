"""One module a verb; each has `main(args) -> exit code`."""

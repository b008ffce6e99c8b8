"""An example of a package that adds to excise; docs/extending.md speaks of it."""

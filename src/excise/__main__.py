"""`python -m excise` is the command."""

from excise.cli import entry

entry()

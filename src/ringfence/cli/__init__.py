"""The command line: one file a command, and a table of them in `main`."""

from ringfence.cli.main import leave, main

__all__ = ["leave", "main"]

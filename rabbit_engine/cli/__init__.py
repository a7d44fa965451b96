"""The command `rabbit`: tokens and results on stdout, everything else on stderr."""

from rabbit_engine.cli.app import main

__all__ = ["main"]

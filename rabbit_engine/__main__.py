"""`python -m rabbit_engine` is `rabbit`."""

from rabbit_engine.cli import main

main()

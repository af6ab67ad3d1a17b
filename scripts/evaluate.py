"""Evaluate an editor on held-out pairs, or several on a benchmark: `mimicbrush evaluate`."""

from mimicbrush.cli.evaluate import main
from mimicbrush.errors import cli_main

if __name__ == "__main__":
    cli_main(main)

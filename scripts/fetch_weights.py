"""Fetch and check the weights that a training run begins with: `mimicbrush fetch`."""

from mimicbrush.cli.fetch import main
from mimicbrush.errors import cli_main

if __name__ == "__main__":
    cli_main(main)

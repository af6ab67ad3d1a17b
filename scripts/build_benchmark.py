"""Build a benchmark in the released layout: `mimicbrush benchmark`."""

from mimicbrush.cli.benchmark import main
from mimicbrush.errors import cli_main

if __name__ == "__main__":
    cli_main(main)

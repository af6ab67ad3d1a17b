"""Print what has come out of a sweep so far: `mimicbrush sweep-table`."""

from mimicbrush.cli.dev.sweep_table import main
from mimicbrush.errors import cli_main

if __name__ == "__main__":
    cli_main(main)

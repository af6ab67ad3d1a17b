"""Check a mined folder, export its manifest, write its report: `mimicbrush pairs`."""

from mimicbrush.cli.pairs import main
from mimicbrush.errors import cli_main

if __name__ == "__main__":
    cli_main(main)

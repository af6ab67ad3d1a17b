"""The rows of the paper's Tables 3 and 4 at the scale of the small model: `mimicbrush ablations`."""

from mimicbrush.cli.dev.ablations import main
from mimicbrush.errors import cli_main

if __name__ == "__main__":
    cli_main(main)

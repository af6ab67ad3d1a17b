"""The whole way in a few minutes, from clips to edits: `mimicbrush demo`."""

from mimicbrush.cli.dev.demo import main
from mimicbrush.errors import cli_main

if __name__ == "__main__":
    cli_main(main)

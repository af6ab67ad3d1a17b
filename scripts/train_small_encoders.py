"""Train the frozen networks of the small model: `mimicbrush encoders`."""

from mimicbrush.cli.dev.encoders import main
from mimicbrush.errors import cli_main

if __name__ == "__main__":
    cli_main(main)

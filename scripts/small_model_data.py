"""Make what the small model is trained on and tested with: `mimicbrush data`."""

from mimicbrush.cli.dev.data import main
from mimicbrush.errors import cli_main

if __name__ == "__main__":
    cli_main(main)

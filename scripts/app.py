"""Edit in the browser: `mimicbrush app`."""

from mimicbrush.cli.app import main
from mimicbrush.errors import cli_main

if __name__ == "__main__":
    cli_main(main)

"""Paint masks over images, in the browser: `mimicbrush paint`."""

from mimicbrush.cli.paint import main
from mimicbrush.errors import cli_main

if __name__ == "__main__":
    cli_main(main)

"""Edit an image by imitating another, or many images: `mimicbrush edit`."""

from mimicbrush.cli.edit import main
from mimicbrush.errors import cli_main

if __name__ == "__main__":
    cli_main(main)

"""Fixed augmentations of training pairs, encoded once: `mimicbrush encode-views`."""

from mimicbrush.cli.dev.encode_views import main
from mimicbrush.errors import cli_main

if __name__ == "__main__":
    cli_main(main)

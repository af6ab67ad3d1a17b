"""Keypoint transfer (PCK) by the reference attention and by features: `mimicbrush pck`."""

from mimicbrush.cli.pck import main
from mimicbrush.errors import cli_main

if __name__ == "__main__":
    cli_main(main)

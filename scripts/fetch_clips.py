"""Fetch freely licensed clips, with their licences: `mimicbrush fetch-clips`."""

from mimicbrush.cli.dev.fetch_clips import main
from mimicbrush.errors import cli_main

if __name__ == "__main__":
    cli_main(main)

"""A checkpoint of a training run -> a pipeline folder: `mimicbrush export`."""

from mimicbrush.cli.export import main
from mimicbrush.errors import cli_main

if __name__ == "__main__":
    cli_main(main)

"""Released checkpoints in and out: `mimicbrush convert`."""

from mimicbrush.cli.convert import main
from mimicbrush.errors import cli_main

if __name__ == "__main__":
    cli_main(main)

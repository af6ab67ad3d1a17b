"""Train a model, or a sweep of them: `mimicbrush train`."""

from mimicbrush.cli.train import main
from mimicbrush.errors import cli_main

if __name__ == "__main__":
    cli_main(main)
